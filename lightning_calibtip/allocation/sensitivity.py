"""Sensitivity: the loss when one layer takes a candidate width and all others stay at the base."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import output_logits
from ..calibration.fingerprint import digest, digest_data, digest_states
from ..calibration.losses import Loss, LossFunction, check_metric
from ..calibration.recording import Recording
from ..calibration.replay import CalledAgainError, Replay
from ..calibration.steps import Steps, untold
from ..quantization.layers import QuantizedLayer
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits
from .table import Conditions, SensitivityFile, SensitivityTable

log = logging.getLogger(__name__)

# Relative difference of outputs that other memory layouts may make.
_TOLERANCE = 1e-3


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
    steps: Steps = untold,
) -> SensitivityTable:
    """Measure the loss for every free layer and candidate.

    Layers are measured in the order of execution. What comes before the measured layer is replayed from the
    activations of the base, so that a measurement costs the layer and what follows it. Whether the replayed model
    still gives the base's output is tried on one batch for each layer; where a model does not allow it (values that
    leave the graph, side effects), a warning says so and the rest is measured by whole passes. So are layers inside
    other layers, and those that the first batch does not reach.

    A layer keeps its present state for its present width (whatever stages have done to it before); it takes another
    width with the parameters that AdaQuant found for it there, if it has (``variants``), else with ranges alone.

    Args:
        network: Calibrated; left at the base.
        loss: What is measured, and on which samples.
        candidates: ``(weight_bits, activation_bits)`` pairs.
        path: CSV file that gets each measurement as it is made; one that a killed run has left is gone on with.
        store: Where activations are kept; all in memory if None.
        steps: Told of each measurement.

    Raises:
        ValueError: If a loss is not finite (names layer and candidate), or the file at ``path`` is of another run.
    """
    base = base_bits(candidates)
    keep_states(network)
    conditions = describe_conditions(network, loss, base)
    for name in network.free_layers:
        network.layers[name].take(base)
    with TemporaryDirectory() as folder, SensitivityFile(path or Path(folder) / "table.csv", conditions) as file:
        table = file.table or file.add_base(loss())

        def measure(layer: QuantizedLayer, run: Callable[[int], Any]) -> None:
            try:
                # Widths that differ only in a part that does not act on the layer have the same loss.
                known = {layer.acting(base): table.base_loss}
                for bits in candidates:
                    if bits != base and bits not in table.losses.get(layer.name, {}):
                        if (acting := layer.acting(bits)) not in known:
                            layer.take(bits)
                            known[acting] = loss(run)
                        file.add(layer.name, bits, known[acting])
                        told = f"{layer.name} at W{bits[0]}A{bits[1]}: loss {table.rise(layer.name, bits):+.4g}"
                        log.info(told)
                        done = sum(len(of_layer) for of_layer in table.losses.values())
                        steps(done, (len(candidates) - (base in candidates)) * len(network.free_layers), told)
            finally:
                layer.take(base)

        done = _measure_by_replay(network, loss, store or ActivationStore(), measure)
        for name in network.free_layers:
            if name not in done:
                measure(network.layers[name], loss.calibration.run)
    return table


def _measure_by_replay(
    network: QuantizedNetwork,
    loss: Loss,
    store: ActivationStore,
    measure: Callable[[QuantizedLayer, Callable[[int], Any]], None],
) -> set[str]:
    """Measure as many layers as replay serves, all others being at the base; returns their names."""
    assert network.structure is not None
    running = [name for name in network.structure.calls_of if name in network.free_layers]
    names = [name for name in running if not any(name.startswith(f"{other}.") for other in running)]
    stream = Replay(network.model, network.structure, loss.calibration, names, store, to_end=True)
    wanted = _output(loss, loss.calibration.run)
    done = set()
    for name in names:
        try:
            outputs = _outputs(stream, network.layers[name])
            if right := _is_close(_output(loss, stream.run), wanted):
                measure(network.layers[name], stream.run)
        except CalledAgainError:
            right = False
        if not right:
            log.warning("%s: the model cannot be replayed from here on; the rest is measured by whole passes.", name)
            break
        done.add(name)
        stream.finish(name, outputs)
    stream.forget()
    return done


@torch.no_grad()
def _output(loss: Loss, run: Callable[[int], Any]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in output_logits(run(0))]


def _is_close(output: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(
        found.shape == right.shape and float((found - right).norm()) <= _TOLERANCE * float(right.norm())
        for found, right in zip(output, wanted, strict=True)
    )


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
