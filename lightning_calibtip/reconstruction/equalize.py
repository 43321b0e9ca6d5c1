"""Equalization of inputs: channels of different range share the one scale of a tensor fairly."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.logits import float_logits, measure_divergences
from ..calibration.progress import ProgressCallback, no_progress
from ..calibration.replay import NotReachedError
from ..network.absorption import find_absorbers
from ..network.channels import is_free
from ..network.hooks import make_room_for_bias
from ..network.network import QuantizedNetwork
from ..network.tensors import ObservedTensor
from ..network.trial import trial
from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.observers import make_observer
from ..quantization.ranges import lp_optimal_range
from ..quantization.spec import Channels, TensorSpec
from .equalizable import EqualizationOptions, check_absorb, equalizable_inputs, may_divide
from .float_stream import FloatRecord, FloatStream
from .options import AdaQuantOptions
from .readers import Reader, readers_of
from .unit_data import UnitData, split_by_samples
from .units import Unit, find_units

log = logging.getLogger(__name__)

# Ratios are from 1 / this to this: a channel that was quiet by chance must not saturate when it is not.
_MOST = 64.0


@dataclass(frozen=True)
class EqualizedInput:
    """What equalization found for one tensor.

    Args:
        name: Name of the tensor.
        layers: Names of the layers that read it.
        absorbed_by: Name of the module that takes its ratios in when it is exported; ``""`` if none can.
        exponent: Exponent that was chosen; 0 if its channels are not equalized.
        error_before: Relative error of the outputs of these layers before, on held-out samples.
        error_after: The same with the exponent that was chosen.

    Example:
        See ``equalize``.
    """

    name: str
    layers: tuple[str, ...]
    absorbed_by: str
    exponent: float
    error_before: float
    error_after: float


@dataclass(frozen=True)
class EqualizationResult:
    """Outcome of equalization.

    Args:
        inputs: What was found for each tensor whose channels can be equalized, in the order of execution.
        divergence_before: KL divergence from the float model before, in nats a sample.
        divergence_after: The same of the state that was kept.
        kept: Whether the equalized state was kept.
        note: Why it was not; ``""`` if it was.

    Example:
        See ``equalize``.
    """

    inputs: tuple[EqualizedInput, ...]
    divergence_before: float
    divergence_after: float
    kept: bool
    note: str = ""


@torch.no_grad()
def equalize(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: EqualizationOptions | None = None,
    store: ActivationStore | None = None,
    progress: ProgressCallback = no_progress,
) -> EqualizationResult:
    """Give the channels of each input ratios by which they are divided before they are rounded, and its weights too.

    The input is rounded as ``round(x_c / (s r_c)) + z`` and read with the one scale ``s``; the weights of channel
    ``c`` are multiplied by ``r_c`` before they are quantized (Meller et al. 2019, Nagel et al. 2019; SmoothQuant: Xiao
    et al. 2023). In float nothing changes. Inputs whose layers are depthwise are free: the scales of the weight's
    channels take the ratios in. Each input keeps its ratios only where the outputs of its layers come closer to the
    float ones, and the whole only if the model, with weights that are not rounded, comes closer to the float logits:
    what rounding weights to nearest adds at random is for reconstruction to mend. Ratios go on learning in
    reconstruction; inputs that have none begin there with ratios of 1.

    Args:
        network: Calibrated network.
        calibration: Calibration set.
        options: See ``EqualizationOptions``.
        store: Store of captured activations; all are held in memory if None.
        progress: Progress callback, called for each layer.

    Returns:
        What was chosen for each input, and the divergence.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
        TypeError: If the model's output holds no logits.
        ValueError: If ``absorb`` asks for what the scheme's target cannot run.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> _ = model[0].weight.data[0].mul_(100)
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(64, 4))
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=8, activation_bits=4, edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> [(found.name, found.absorbed_by) for found in equalize(network, calibration).inputs]
        [('0 input', ''), ('2 input', '0')]
    """
    if not network.calibrated:
        raise RuntimeError("Equalization starts from calibrated ranges: run Calibration first.")
    calibration.require()
    check_absorb(options or EqualizationOptions(), network.scheme)
    options, store = options or EqualizationOptions(), store or ActivationStore()
    calibration = calibration.first(options.samples)
    for tensor in network.tensors:
        tensor.learnable = None
    assert network.structure is not None
    absorbers = find_absorbers(network.model, network.structure, network.layers)
    groups = {
        tensor: channels
        for tensor, layers, channels in equalizable_inputs(network)
        if tensor in absorbers or may_divide(network, layers, options.absorb)
    }
    readers = {layer: tensor for tensor in groups for layer in tensor.readers}
    single = {unit.name: unit for unit in find_units(network, "layer") if unit.name in readers}
    units = [unit for unit in find_units(network, "block") if any(layer.name in readers for layer in unit.layers)]
    if not units:
        return EqualizationResult((), 0.0, 0.0, True)
    logits, everything = float_logits(network, calibration), list(range(len(calibration)))
    floats = FloatStream(network, calibration, AdaQuantOptions(), units, store)
    waiting: dict[ObservedTensor, list[Reader]] = {tensor: [] for tensor in groups}
    found = []
    layers = [network.layers[name] for name in readers]

    def divergence() -> Tensor:
        with _float_weights(network):
            return measure_divergences(calibration, logits, everything)

    with trial(layers, divergence) as attempt:
        for position, unit in enumerate(units):
            progress(position, len(units), unit.name)
            try:
                record = floats.record(unit, keep_inputs=True)
            except NotReachedError as error:
                log.warning("%s: its inputs are not equalized: %s.", unit.name, error)
                continue
            inside = [single[layer.name] for layer in unit.layers if layer.name in single]
            for reader in _readers(network, unit, inside, record, options):
                tensor = readers[reader.layer.name]
                waiting[tensor].append(reader)
                if len(waiting[tensor]) == len(set(tensor.readers)):
                    absorber = absorbers.get(tensor, "")
                    found.append(_equalize(tensor, groups[tensor], waiting.pop(tensor), absorber, options))
            floats.finish(unit, record)
        floats.forget()
    before, after, note = float(attempt.before.mean()), float(attempt.after.mean()), ""
    if not attempt.kept:
        tried = float(attempt.tried.mean())
        note = f"it did not lower the divergence that the inputs' rounding makes ({before:.4g} to {tried:.4g})"
        log.warning("Equalization: layers restored, since %s.", note)
        found = [replace(one, exponent=0.0, error_after=one.error_before) for one in found]
    network.set_absorbers(absorbers)
    for tensor, channels in groups.items():
        tensor.learnable = channels
    return EqualizationResult(tuple(found), before, after, attempt.kept, note)


def _readers(
    network: QuantizedNetwork, unit: Unit, layers: Sequence[Unit], record: FloatRecord, options: EqualizationOptions
) -> list[Reader]:
    """Layers of a unit with what they are given, see ``readers_of``; none, with a warning, if the unit cannot be run by
    samples."""
    assert record.inputs is not None
    try:
        dataset = split_by_samples(unit, UnitData(record.inputs, record.targets, None, record.weights))
        return readers_of(network, unit, layers, dataset, options)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        log.warning("%s: its inputs are not equalized (%s: %s).", unit.name, type(error).__name__, error)
        return []


@contextmanager
def _float_weights(network: QuantizedNetwork) -> Iterator[None]:
    """Inside, weights are not rounded."""
    quantizers = [layer.weight_quantizer for layer in network.layers.values() if layer.weight_quantizer is not None]
    enabled = [quantizer.enabled for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, was in zip(quantizers, enabled, strict=True):
            quantizer.enabled = was


def _equalize(
    tensor: ObservedTensor,
    channels: Channels,
    readers: Sequence[Reader],
    absorbed_by: str,
    options: EqualizationOptions,
) -> EqualizedInput:
    """Try the exponents on one tensor and leave its layers at the best."""
    layers = [reader.layer for reader in readers]
    values = readers[0].values
    spread = _relative_ranges(values, [spec for spec in layers[0].config.inputs if spec is not None])
    free = all(is_free(layer.module, layer.type, layer.latent()[0]) for layer in layers)
    states = best_states = [layer.save() for layer in layers]
    chosen, before = 0.0, sum(reader.error() for reader in readers)
    best = before
    # An exponent of 0 is what there is already.
    for exponent in (1.0,) if free else filter(None, options.exponents):
        ratio = spread.pow(exponent)
        # All readers end what there was before the first takes the new ratios, which they share.
        for layer in layers:
            layer.equalize(None, None)
        for layer in layers:
            layer.equalize(channels, ratio)
        for quantizer, of_operand in zip(layers[0].input_quantizers, values, strict=True):
            assert isinstance(quantizer, AffineQuantizer) and quantizer.divisors is not None
            observer = make_observer(layers[0].range_options).to(of_operand.device)
            observer.update(of_operand / quantizer.divisors)
            quantizer.set_range(*observer.compute_range(quantizer.spec))
        for layer in layers:
            make_room_for_bias(layer.config, layer.latent()[1], layer.input_quantizers, layer.weight_quantizer)
        error = sum(reader.error() for reader in readers)
        if error < best:
            chosen, best, best_states = exponent, error, [layer.save() for layer in layers]
        for layer, state in zip(layers, states, strict=True):
            layer.restore(state)
    for layer, state in zip(layers, best_states, strict=True):
        layer.restore(state)
    return EqualizedInput(tensor.name, tuple(layer.name for layer in layers), absorbed_by, chosen, before, best)


def _relative_ranges(values: Sequence[Tensor], specs: Sequence[TensorSpec]) -> Tensor:
    """Width of the range that loses least of each channel, over the geometric mean of all; 1 for dead channels.

    Of a product, the root of what the first operand's is over the second's: then both have channels of one range.

    Args:
        values: Values of each operand, shape (n, channels).
        specs: Formats of the operands.
    """
    widths = [_widths(of_operand, spec) for of_operand, spec in zip(values, specs, strict=True)]
    alive = torch.stack(widths).amin(0) > 0
    first, *second = (torch.where(alive, width, 1.0).log() for width in widths)
    logs = (first - second[0]) / 2 if second else first
    mean = logs.sum() / max(int(alive.sum()), 1)
    most = math.log(_MOST)
    return torch.where(alive, (logs - mean).clamp(-most, most), 0.0).exp()


def _widths(values: Tensor, spec: TensorSpec) -> Tensor:
    rows = values.t().contiguous()
    low, high = lp_optimal_range(rows, None, rows.amin(1), rows.amax(1), spec, 2.0)
    return torch.maximum(-low, high) if spec.symmetric else high - low
