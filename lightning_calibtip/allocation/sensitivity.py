"""Sensitivity: the loss when one layer has a candidate's bit-widths and all others those of the base."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import ranks
from ..calibration.activation_store import ActivationStore
from ..calibration.divergences import Divergence
from ..calibration.fingerprint import digest_data, digest_states
from ..calibration.layer_by_layer import Run, owners_of, visit_layers
from ..calibration.losses import Loss, LossFunction, check_metric
from ..calibration.progress import ProgressCallback, no_progress
from ..calibration.utility import with_utility
from ..files.digest import digest
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..quantization.spec import BitWidths
from .table import Conditions, SensitivityFile, SensitivityTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SensitivityOptions:
    """How sensitivities are measured.

    Args:
        metric: See ``Loss``.
        samples: Number of calibration samples to measure on; all if None.
        path: CSV file that gets the measurements as they are made, see ``measure_sensitivity``.
        reuse: CSV file of an earlier run, whose measurements are reused instead of measuring.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> SensitivityOptions(samples=256).metric
        'kl'
    """

    metric: str | LossFunction | Divergence | Mapping[str, Any] = "kl"
    samples: int | None = None
    path: Path | None = None
    reuse: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", with_utility(self.metric, "metric"))
        check_metric(self.metric)
        if self.samples is not None and (not isinstance(self.samples, int) or self.samples < 1):
            raise ValueError(f"samples must be an integer of at least 1, got {self.samples!r}.")


def base_bits(candidates: Sequence[BitWidths]) -> BitWidths:
    """Bit-widths of all layers that are not being measured: the widest weights and the widest activations.

    Args:
        candidates: Candidates; float is wider than any bit-width.

    Example:
        >>> base_bits([BitWidths(2, 8), BitWidths(8, 4)]).label, base_bits([BitWidths(2, 8), BitWidths(4, None)]).label
        ('W8A8', 'W4')
    """
    weights, activations = [bits.weight for bits in candidates], [bits.activation for bits in candidates]
    return BitWidths(_widest(weights), _widest(activations))


def _widest(bits: list[int | None]) -> int | None:
    known = [number for number in bits if number is not None]
    return max(known) if len(known) == len(bits) else None


def measure_sensitivity(
    network: QuantizedNetwork,
    loss: Loss,
    candidates: Sequence[BitWidths],
    path: str | Path | None = None,
    store: ActivationStore | None = None,
    progress: ProgressCallback = no_progress,
) -> SensitivityTable:
    """Measure the loss for every searchable layer and candidate.

    Layers are measured in the order of execution, by replay of the base's activations; see ``visit_layers``.

    A layer keeps its present state for its present format (whatever stages have done to it before); it is switched to
    another format with the parameters that AdaQuant found for it there, if it has (``variants``), else with ranges
    alone. Candidates that come to the same format of a layer are measured once.

    Args:
        network: Calibrated network; left at the base.
        loss: What is measured, and on which samples.
        candidates: Candidate bit-widths.
        path: CSV file that gets each measurement as it is made; one that a killed run has left is resumed.
        store: Store of captured activations; all in memory if None.
        progress: Progress callback, called after each measurement.

    Raises:
        ValueError: If a loss is not finite (names layer and candidate), or the file at ``path`` is of another run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.calibration.calibration_set import CalibrationSet
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(8, 2))
        >>> network = QuantizedNetwork(model, QuantizationScheme(edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> candidates = [BitWidths(2, None), BitWidths(8, None)]
        >>> table = measure_sensitivity(network, Loss(network, calibration), candidates)
        >>> table.conditions.base.label, table.rise("0", candidates[0]) > 0
        ('W8', True)
    """
    base = base_bits(candidates)
    keep_states(network)
    conditions = describe_conditions(network, loss, base)
    searchable = network.searchable_layers
    for name in searchable:
        network.switch(name, base)
    # One rank keeps the file; the others have one for as long as they measure.
    path = path if ranks.rank() == 0 else None
    with TemporaryDirectory() as folder, SensitivityFile(path or Path(folder) / "table.csv", conditions) as file:
        begun = ranks.from_first(file.table)
        table = file.table or file.add_base(loss() if begun is None else begun.base_loss)
        owners = owners_of(network, searchable)
        if begun is not None:
            table.losses.update(begun.losses)

        def measure(layer: QuantizedLayer, run: Run) -> None:
            if owners[layer.name] != ranks.rank():
                return
            try:
                known = {network.config_for(layer.name, base): table.base_loss}
                for bits in candidates:
                    if bits != base and bits not in table.losses.get(layer.name, {}):
                        config = network.config_for(layer.name, bits)
                        if config not in known:
                            layer.switch(config)
                            known[config] = loss(run)
                        file.add(layer.name, bits, known[config])
                        text = f"{layer.name} at {bits.label}: loss {table.rise(layer.name, bits):+.4g}"
                        log.info(text)
                        done = sum(len(of_layer) for of_layer in table.losses.values())
                        progress(done, (len(candidates) - (base in candidates)) * len(searchable), text)
            finally:
                network.switch(layer.name, base)

        visit_layers(network, loss, searchable, measure, store)
        for measured_by_rank in ranks.from_all(table.losses):
            for name, of_layer in measured_by_rank.items():
                for bits, value in of_layer.items():
                    if bits not in table.losses.get(name, {}):
                        file.add(name, bits, value)
    return table


def keep_states(network: QuantizedNetwork) -> None:
    """Let every searchable layer come back to its present state whenever it comes back to its present format.

    Args:
        network: Calibrated network.

    Example:
        See ``measure_sensitivity``, which begins with it.
    """
    for name in network.searchable_layers:
        layer = network.layers[name]
        layer.variants[layer.config] = layer.save()


def describe_conditions(network: QuantizedNetwork, loss: Loss, base: BitWidths) -> Conditions:
    """Describe what measurements with this base depend on.

    Args:
        network: Calibrated network.
        loss: What is measured, and on which samples.
        base: Bit-widths of the base.

    Example:
        See ``measure_sensitivity``, whose table holds them.
    """
    states = [
        state
        for layer in network.layers.values()
        for state in [layer.save(), *(s for _, s in sorted(layer.variants.items(), key=lambda item: repr(item[0])))]
    ]
    everything = digest([digest_states(states), digest_data(loss.calibration)])
    return Conditions(network.fingerprint[:16], everything[:16], loss.name, loss.calibration.samples, base)
