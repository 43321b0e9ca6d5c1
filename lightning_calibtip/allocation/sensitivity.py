"""Sensitivity: the loss when one layer takes a candidate width and all others stay at the base."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..calibration.activation_store import ActivationStore
from ..calibration.fingerprint import digest, digest_data, digest_states
from ..calibration.losses import Loss, LossFunction, check_metric
from ..calibration.recording import Recording
from ..calibration.replay import Replay
from ..quantization.layers import QuantizedLayer
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits
from .table import Conditions, SensitivityFile, SensitivityTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """How sensitivities come about.

    Args:
        metric: See ``Loss``.
        samples: How many calibration samples to measure on; all if None.
        path: CSV file that gets the measurements as they are made, see ``measure_sensitivity``.
        again: CSV file of an earlier run, to be taken instead of measuring.

    Raises:
        ValueError: If a value is out of its range.
    """

    metric: str | LossFunction = "kl"
    samples: int | None = None
    path: Path | None = None
    again: Path | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}.")


def base_bits(candidates: Sequence[Bits]) -> Bits:
    """The width of all layers that are not being measured: the widest weights and the widest activations."""
    return max(weight for weight, _ in candidates), max(activation for _, activation in candidates)


def measure_sensitivity(
    network: QuantizedNetwork,
    loss: Loss,
    candidates: Sequence[Bits],
    path: str | Path | None = None,
    store: ActivationStore | None = None,
) -> SensitivityTable:
    """Measure the loss for every free layer and candidate.

    Layers are measured in the order of execution. What comes before the measured layer is replayed from the
    activations of the base, so that a measurement costs the layer and what follows it.

    A layer keeps its present state for its present width (whatever stages have done to it before); it takes another
    width with the parameters that AdaQuant found for it there, if it has (``variants``), else with ranges alone.

    Args:
        network: Calibrated; left at the base.
        loss: What is measured, and on which samples.
        candidates: ``(weight_bits, activation_bits)`` pairs.
        path: CSV file that gets each measurement as it is made; one that a killed run has left is gone on with.
        store: Where activations are kept; all in memory if None.

    Raises:
        ValueError: If a loss is not finite (names layer and candidate), or the file at ``path`` is of another run.
    """
    base = base_bits(candidates)
    assert network.structure is not None
    names = [name for name in network.structure.calls_of if name in network.free_layers]
    keep_states(network)
    conditions = describe_conditions(network, loss, base)
    for name in names:
        network.layers[name].take(base)
    with TemporaryDirectory() as folder, SensitivityFile(path or Path(folder) / "table.csv", conditions) as file:
        table = file.table or file.add_base(loss())
        stream = Replay(network.model, network.structure, loss.calibration, names, store or ActivationStore(), True)
        for name in names:
            layer = network.layers[name]
            outputs = _outputs(stream, layer)
            for bits in candidates:
                if bits == base or bits in table.losses.get(name, {}):
                    continue
                layer.take(bits)
                file.add(name, bits, loss(stream.run))
                log.info("%s at W%dA%d: loss %+.4g", name, *bits, table.rise(name, bits))
            layer.take(base)
            stream.finish(name, outputs)
        stream.forget()
    return table


@torch.no_grad()
def _outputs(stream: Replay, layer: QuantizedLayer) -> Recording:
    """What the layer, as it is, gives at all its calls."""
    outputs = stream.recording(layer.name)
    for calls in stream.capture(layer.name):
        for call in calls:
            outputs.append(layer.module(*call.args, **call.kwargs))
    return outputs


def keep_states(network: QuantizedNetwork) -> None:
    """Let every free layer come back to its present state whenever it comes back to its present width."""
    for name in network.free_layers:
        layer = network.layers[name]
        layer.variants[layer.bits] = layer.save()


def describe_conditions(network: QuantizedNetwork, loss: Loss, base: Bits) -> Conditions:
    """What measurements with this base depend on."""
    layers = network.layers.values()
    states = [state for layer in layers for state in [layer.save(), *(s for _, s in sorted(layer.variants.items()))]]
    everything = digest([digest_states(states), digest_data(loss.calibration)])
    return Conditions(network.fingerprint[:16], everything[:16], loss.name, loss.calibration.samples, base)
