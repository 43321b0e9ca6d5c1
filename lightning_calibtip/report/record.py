"""The record of a run, ``result.json``: metrics of each stage, size, and the status of each layer."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import write_atomically
from ..network.network import QuantizedNetwork
from .item import SUFFIXES
from .metrics import Validation, metric_records
from .size import BitOperations, model_size
from .table import text_table
from .versions import versions

RECORD_VERSION = 1
RECORD_NAME = "result.json"


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run.

    Args:
        name: Name of the stage.
        seconds: Time that it took.
        metric: Metric after it; None where nothing was evaluated.
        figures: What the stage itself measured.
        metrics: Everything that validation logged after it.
        outcome: What became of the stage, in whole sentences.

    Example:
        >>> StageRecord("Calibration", 1.5, 0.8).figures
        {}
    """

    name: str
    seconds: float
    metric: float | None
    figures: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    outcome: str = ""


def peak_rss_bytes() -> int | None:
    """Greatest resident memory of this process so far; None where the system does not tell (Windows).

    Example:
        >>> (peak_rss_bytes() or 0) >= 0
        True
    """
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def layer_records(network: QuantizedNetwork) -> list[dict[str, Any]]:
    """One entry for each quantizable layer.

    ``weight_bits`` and ``activation_bits`` are None where there is no weight, or where weight or inputs are in float.
    ``error_before`` and ``error_after`` are relative to the output's mean square, and None where nothing was
    reconstructed.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> network = QuantizedNetwork(nn.Sequential(nn.Linear(2, 3)), QuantizationScheme())
        >>> [(layer["name"], layer["weight_bits"]) for layer in layer_records(network)]
        [('0', None)]
    """
    unfolded_norms = network.plan.unfolded_norms if network.plan is not None else {}
    records = []
    for line in network.summary():
        if line.kind == "folded" or line.name in unfolded_norms:
            continue
        layer = network.layers.get(line.name)
        before, after = (layer.errors if layer is not None else None) or (None, None)
        records.append(
            {
                "name": line.name,
                "weight_bits": line.weight_bits,
                "activation_bits": line.activation_bits,
                "parameters": line.parameters,
                "error_before": before,
                "error_after": after,
            }
        )
    return records


def run_record(
    network: QuantizedNetwork,
    recipe: str,
    model: str,
    metric: str,
    seed: int | None,
    calibration_samples: int,
    float_metric: float | None,
    stages: Sequence[StageRecord],
    report_items: Sequence[str] = (),
    float_metrics: Mapping[str, float] | None = None,
    validation: Validation | None = None,
    operations: BitOperations | None = None,
) -> dict[str, Any]:
    """All figures of a run as plain values; metrics are fractions (0 to 1).

    Args:
        network: The quantized network.
        recipe: Name of the recipe.
        model: Name of the model.
        metric: Name of the metric.
        seed: Random seed of all stages; None if each has the seed of its own options.
        calibration_samples: Number of samples that were used.
        float_metric: Metric of the float model; None where nothing was evaluated.
        stages: The stages, in order.
        report_items: Names of the report items that are written beside the record, see ``remove_previous_items``.
        float_metrics: Everything that validation logged for the float model.
        validation: What else is known of the validation.
        operations: Bit operations of the model; None where they are not known.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> network = QuantizedNetwork(nn.Sequential(nn.Linear(2, 3)), QuantizationScheme())
        >>> stages = [StageRecord("Calibration", 1.5, 0.8), StageRecord("AdaQuant", 20.0, 0.9)]
        >>> record = run_record(network, "recipe", "net", "top1", 0, 32, 0.95, stages, ["layers"])
        >>> record["float"], record["calibrated"], record["quantized"], record["report_items"]
        (0.95, 0.8, 0.9, ['layers'])
    """
    size = model_size(network)
    return {
        "version": RECORD_VERSION,
        "recipe": recipe,
        "model": model,
        "metric": metric,
        "seed": seed,
        "calibration_samples": calibration_samples,
        "float": float_metric,
        "calibrated": next((stage.metric for stage in stages if stage.name == "Calibration"), None),
        "quantized": stages[-1].metric if stages else None,
        "metrics": metric_records(float_metrics or {}, [stage.metrics for stage in stages], validation or Validation()),
        "stages": [asdict(stage) for stage in stages],
        "size": {"float_bytes": size.float_bytes, "quantized_bytes": size.quantized_bytes, "ratio": size.ratio},
        "bit_operations": None
        if operations is None
        else {
            "float": operations.float_operations,
            "quantized": operations.quantized_operations,
            "ratio": operations.ratio,
        },
        "layers": layer_records(network),
        "report_items": list(report_items),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON: completely or not at all. NaN and infinity become null.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_record(f"{folder}/result.json", {"float": float("nan")})
        ...     json.loads(Path(folder, "result.json").read_text())
        {'float': None}
    """
    write_atomically(path, (json.dumps(_valid(record), indent=2, allow_nan=False) + "\n").encode())


def remove_previous_items(folder: str | Path) -> None:
    """Remove the tables and pictures of an earlier run from its folder, so that none of them passes for a later run's.

    Only files of the report items and pages that the folder's ``result.json`` names are removed; everything else is
    left alone.

    Args:
        folder: Folder that a report is about to be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("layers.csv", "mine.csv"):
        ...         Path(folder, name).touch()
        ...     write_record(f"{folder}/result.json", {"report_items": ["layers"]})
        ...     remove_previous_items(folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['mine.csv', 'result.json']
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
    except (OSError, ValueError):
        # There is no record, or it is none of ours.
        return
    for key, suffixes in (("report_items", SUFFIXES), ("report_pages", (".html",))):
        names = record.get(key) if isinstance(record, dict) else None
        for name in names if isinstance(names, list) else ():
            # A name that leads out of the folder is none that a run has written.
            if isinstance(name, str) and name == Path(name).name:
                for suffix in suffixes:
                    if (path := folder / f"{name}{suffix}").is_file():
                        path.unlink()


def _valid(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _valid(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record_table(record: Mapping[str, Any]) -> str:
    """The stages of a record as a text table; for AdaQuant also the share of its time that is not spent in the
    optimiser's steps.

    Example:
        >>> stages = [{"name": "Calibration", "seconds": 1.5, "metric": 0.8, "figures": {}}]
        >>> print(record_table({"float": 0.95, "metric": "top1", "stages": stages}))
        stage        seconds  outside steps  top1
        -----------  -------  -------------  ----
        float              -              -  0.95
        Calibration      1.5              -   0.8
    """
    rows: list[list[object]] = [["float", None, None, record["float"]]]
    for stage in record["stages"]:
        steps, seconds = stage["figures"].get("step_seconds"), stage["seconds"]
        outside = None if steps is None or not seconds else f"{1 - steps / seconds:.1%}"
        rows.append([stage["name"], seconds, outside, stage["metric"]])
    return text_table(["stage", "seconds", "outside steps", record["metric"]], rows)
