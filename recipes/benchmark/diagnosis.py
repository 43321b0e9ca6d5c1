"""What a diagnosis is worth: what its three worst layers gain at 8 bits, and what applying its remedies comes to."""

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_calibtip import Calibration, QuantizationModule, QuantizationScheme
from lightning_calibtip.allocation.sensitivity import measure_sensitivity
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.callbacks.stage import Stage, StageResult
from lightning_calibtip.pipeline.run import QuantizationRun
from lightning_calibtip.pipeline.runner import run_stages
from lightning_calibtip.quantization.spec import BitWidths

from .accuracy import AccuracySubject, parse_bits
from .network import validate

# Networks and bit-widths at which ranges alone lose much.
SUBJECTS = {"resnet20": "W4A4", "efficientnet_lite0": "W4A8", "bert": "W8A4"}

# Layers that are set to 8 bits, and what is compared with them.
_WORST = 3


class _SensitivityTable(Stage):
    """Measures the table that bit allocation needs at its default candidates."""

    @override
    def run(self, module: QuantizationModule) -> StageResult:
        candidates = [BitWidths(4, 4), BitWidths(8, 8)]
        measure_sensitivity(module.network, Loss(module.network, module.calibration), candidates)
        return StageResult()


def measure_diagnosis(subject: AccuracySubject, width: str, max_degradation: float) -> dict[str, Any]:
    """A row for one network: metrics with ranges only, with the three worst layers at 8 bits, with all, and with the
    remedies applied; seconds of the diagnosis and of the table of sensitivities.

    Args:
        subject: The network, of which nothing is tuned on the evaluation data.
        width: Bit-widths, ``"W4A4"``.
        max_degradation: See ``DiagnosisOptions``.
    """
    run = _ranges_only(subject, width)
    network = run.module.network
    quantized = validate(run.module, subject.data, subject.metric)
    started = time.monotonic()
    found = run.diagnose()
    seconds = time.monotonic() - started
    worst = [layer.name for layer in found.worst(_WORST)]
    raised = _raised(run, worst, subject)
    everything = _raised(run, list(network.layers), subject)
    print("\n".join(f"{layer.name}: {layer.cause}; {layer.remedies[0].code}" for layer in found.worst(_WORST)))
    started = time.monotonic()
    run_stages(_ranges_only(subject, width).module, [_SensitivityTable()], subject.data.train_dataloader())
    table_seconds = time.monotonic() - started
    again = _ranges_only(subject, width, subject.data.val_dataloader())
    applied = again.diagnose(apply=True, max_degradation=max_degradation, metric=subject.metric)
    return {
        "network": subject.name,
        "bits": width,
        "float": again.float_metrics[subject.metric],
        "ranges": quantized,
        "worst": worst,
        "worst_at_8": raised,
        "all_at_8": everything,
        "share": (raised - quantized) / (everything - quantized) if everything != quantized else None,
        "seconds": seconds,
        "over_table": seconds / table_seconds,
        "applied": [remedy.code for remedy in applied.applied],
        "bytes": sum(remedy.bytes for remedy in applied.applied),
        "outcome": applied.outcome,
    }


def _ranges_only(subject: AccuracySubject, width: str, validation: Any = None) -> QuantizationRun:
    pl.seed_everything(0, verbose=False)
    weight_bits, activation_bits = parse_bits(width)
    scheme = QuantizationScheme(weight_bits=weight_bits, activation_bits=activation_bits)
    module = QuantizationModule(deepcopy(subject.trained), scheme=scheme)
    return run_stages(module, [Calibration()], subject.data.train_dataloader(), validation)


def _raised(run: QuantizationRun, names: Sequence[str], subject: AccuracySubject) -> float:
    """The metric with some layers at 8 bits, of which the model then has none more than before."""
    network = run.module.network
    saved = {name: network.layers[name].save() for name in names}
    for name in names:
        network.switch(name, BitWidths(8, 8))
    metric = validate(run.module, subject.data, subject.metric)
    for name, state in saved.items():
        network.layers[name].restore(state)
    return metric


def diagnosis_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table.

    Example:
        >>> row = {"network": "net", "bits": "W4A4", "float": 0.9, "ranges": 0.8, "worst_at_8": 0.86, "all_at_8": 0.9}
        >>> row |= {"share": 0.6, "over_table": 0.5, "applied": ["Equalization()"], "bytes": 0, "outcome": "Done."}
        >>> print(diagnosis_table([row]).splitlines()[-1])
        | net W4A4 | 0.9000 | 0.8000 | 0.8600 | 0.9000 | 0.60 | 0.50 | 1 | 0 | Done. |
    """
    head = (
        "| network | float | ranges only | three worst at 8 bits | all at 8 bits | share of the gain "
        "| time over sensitivity table | remedies applied | bytes | outcome |"
    )
    lines = [head, "| --- " * 10 + "|"]
    for row in rows:
        metrics = " | ".join(f"{row[name]:.4f}" for name in ("float", "ranges", "worst_at_8", "all_at_8"))
        share = "-" if row["share"] is None else f"{row['share']:.2f}"
        cells = [f"{row['network']} {row['bits']}", metrics, share, f"{row['over_table']:.2f}"]
        cells += [str(len(row["applied"])), f"{row['bytes']:,}", row["outcome"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
