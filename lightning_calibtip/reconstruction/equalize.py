"""Equalization of inputs: channels of different range share the one scale of a tensor fairly."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.logits import float_logits, measure_divergences
from ..calibration.progress import ProgressCallback, no_progress
from ..network.absorption import find_absorbers
from ..network.channels import channel_count, is_free
from ..network.dataflow import source_of
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.scheme import QuantizationScheme
from ..network.tensors import ObservedTensor
from ..network.trial import trial
from ..quantization.observers import make_observer
from ..quantization.quantizers import AffineQuantizer
from ..quantization.ranges import lp_optimal_range
from ..quantization.spec import Channels, TensorSpec
from .float_stream import FloatStream
from .objectives import Objective, make_objective
from .optimize import mean_error
from .options import AdaQuantOptions
from .unit_data import MiniBatch, UnitData, UnitDataset, split_by_samples
from .units import Unit, find_units

log = logging.getLogger(__name__)

# An engine writes their results as integers, with one scale.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

ABSORB = ("prefer", "engine", "only")

# Ratios are from 1 / this to this: a channel that was quiet by chance must not saturate when it is not.
_MOST = 64.0

# Number of values of each channel that ranges are taken from.
_VALUES = 2048


@dataclass(frozen=True)
class EqualizationOptions:
    """Options of equalization.

    Args:
        absorb: Which inputs may be equalized. ``"prefer"``: all; the module that writes an input takes its ratios in
            when it is exported, if it can (through ReLU, from a layer or a normalization that nothing else reads), and
            the others are divided before they are quantized. ``"only"``: only those whose ratios are taken in
            (cross-layer equalization, Nagel et al. 2019), for engines that do nothing between their layers.
            ``"engine"``: those, and inputs of linear layers that no integer operation writes, where an engine
            quantizes in a step of its own whatever it does. None: what the target asks for; ``"prefer"`` without one.
        exponents: Exponents ``a``, from 0 to 1, of which each input takes the one with the least error: the ratio of a
            channel is (its range / the geometric mean of all ranges)^a. With 0 nothing is equalized, with 1 all
            channels have the same range and the weights pay for it.
        samples: Number of calibration samples, at least 2, of which half give the ranges and half decide.
        seed: Seed of the choice of samples.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> EqualizationOptions(exponents=[0.5]).exponents
        (0.5,)
    """

    absorb: Literal["prefer", "engine", "only"] | None = None
    exponents: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.absorb is not None and self.absorb not in ABSORB:
            raise ValueError(f"absorb must be one of {', '.join(ABSORB)}, or None, got {self.absorb!r}.")
        if isinstance(self.exponents, str) or not all(0 <= exponent <= 1 for exponent in self.exponents):
            raise ValueError(f"exponents must be a list of numbers from 0 to 1, got {self.exponents!r}.")
        object.__setattr__(self, "exponents", tuple(self.exponents))
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 2:
            raise ValueError(f"samples must be an integer of at least 2, got {self.samples!r}.")


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

    Example:
        See ``equalize``.
    """

    inputs: tuple[EqualizedInput, ...]
    divergence_before: float
    divergence_after: float
    kept: bool


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
    what rounding weights to nearest adds at random is for reconstruction to mend.

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
    assert network.structure is not None
    absorbers = find_absorbers(network.model, network.structure, network.layers)
    groups = [
        (tensor, layers)
        for tensor, layers in equalizable_inputs(network)
        if tensor in absorbers or _may_divide(network, layers, options.absorb)
    ]
    readers = {layer.name: tensor for tensor, layers in groups for layer in layers}
    units = [unit for unit in find_units(network, "layer") if unit.name in readers]
    if not units:
        return EqualizationResult((), 0.0, 0.0, True)
    logits, everything = float_logits(network, calibration), list(range(len(calibration)))
    floats = FloatStream(network, calibration, AdaQuantOptions(), units, store)
    waiting: dict[ObservedTensor, list[_Reader]] = {tensor: [] for tensor, _ in groups}
    found = []
    layers = [unit.layers[0] for unit in units]

    def divergence() -> Tensor:
        with _float_weights(network):
            return measure_divergences(calibration, logits, everything)

    with trial(layers, divergence) as attempt:
        for position, unit in enumerate(units):
            progress(position, len(units), unit.name)
            record = floats.record(unit, keep_inputs=True)
            assert record.inputs is not None
            dataset = split_by_samples(unit, UnitData(record.inputs, record.targets, None, record.weights))
            tensor = readers[unit.name]
            waiting[tensor].append(_Reader.of(unit, dataset, options))
            floats.finish(unit, record)
            if len(waiting[tensor]) == len(set(tensor.readers)):
                found.append(_equalize(tensor, waiting.pop(tensor), absorbers.get(tensor, ""), options))
        floats.forget()
    if not attempt.kept:
        log.warning("Equalization did not lower the divergence of the inputs' rounding: restored.")
        found = [replace(one, exponent=0.0, error_after=one.error_before) for one in found]
    network.set_absorbers(absorbers if attempt.kept else {})
    return EqualizationResult(tuple(found), float(attempt.before.mean()), float(attempt.after.mean()), attempt.kept)


def check_absorb(options: EqualizationOptions, scheme: QuantizationScheme) -> None:
    """Refuse to divide inputs where a target would lose its integer operations by that.

    Raises:
        ValueError: If ``absorb`` asks for some.

    Example:
        >>> check_absorb(EqualizationOptions(absorb="only"), QuantizationScheme(target="onnxruntime"))
    """
    target = scheme.engine
    if target is not None and options.absorb and ABSORB.index(options.absorb) < ABSORB.index(target.absorb):
        raise ValueError(
            f"absorb={options.absorb!r} divides activations between integer operations of target={target.name!r}: give "
            f"{target.absorb!r}, or leave it out, or give target=None (on the command line null)."
        )


def equalizable_inputs(network: QuantizedNetwork) -> list[tuple[ObservedTensor, list[QuantizedLayer]]]:
    """The tensors whose channels can be equalized, each with all layers that read it.

    Args:
        network: Calibrated network.
    """
    owners = {layer.tied_to.name for layer in network.layers.values() if layer.tied_to}
    readers: dict[ObservedTensor, list[QuantizedLayer]] = {}
    for layer in network.layers.values():
        for tensor in dict.fromkeys(layer.tensors):
            readers.setdefault(tensor, []).append(layer)
    found = []
    for tensor, layers in readers.items():
        formats = {_format(layer) for layer in layers}
        if len(formats) == 1 and None not in formats and not owners & {layer.name for layer in layers}:
            found.append((tensor, layers))
    return found


def _may_divide(network: QuantizedNetwork, layers: Sequence[QuantizedLayer], absorb: str | None) -> bool:
    """Whether a tensor may be divided before it is quantized: always, or where no integer operation has written it."""
    target = network.scheme.engine
    absorb = absorb or ABSORB[0] if target is None else absorb or target.absorb
    if absorb != "engine":
        return absorb == "prefer"
    assert network.structure is not None
    if not all(isinstance(layer.module, nn.Linear) for layer in layers):
        return False
    writers = {
        source
        for layer in layers
        for call in network.structure.calls_of[layer.name]
        if (source := source_of(network.structure, call.operands[0], network.layers)) is not None
    }
    return not any(
        network.layers[name].type.between_layers or isinstance(network.layers[name].module, _CONVOLUTIONS)
        for name in writers
    )


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


def _format(layer: QuantizedLayer) -> tuple[TensorSpec, Channels] | None:
    """Format and channels of a layer's only input, if these can be equalized."""
    axis = layer.type.operands[0].channel_axis if layer.type.operands else None
    quantizers = layer.input_quantizers
    if len(quantizers) != 1 or axis is None or layer.type.input_axis is None or not layer.has_weight:
        return None
    (quantizer,) = quantizers
    if not isinstance(quantizer, AffineQuantizer) or not quantizer.acts_as_stored:
        return None
    count = channel_count(layer.module, layer.type, layer.latent()[0])
    return quantizer.spec, Channels(axis, count)


@dataclass
class _Reader:
    """A layer that reads the tensor in question, with samples of its own."""

    layer: QuantizedLayer
    unit: Unit
    objective: Objective
    judging: list[MiniBatch]
    values: Tensor

    @classmethod
    def of(cls, unit: Unit, dataset: UnitDataset, options: EqualizationOptions) -> "_Reader":
        (layer,) = unit.layers
        generator = torch.Generator().manual_seed(options.seed)
        index = torch.randperm(dataset.count, generator=generator)[: options.samples]
        half = (len(index) + 1) // 2
        ranging, judging = (index[:half], index[half:]) if len(index) > 1 else (index, index)
        size = 1 if dataset.whole else len(index)
        values = torch.cat([_channels_last(layer, dataset.take(part)) for part in ranging.split(size)])
        chosen = torch.randperm(len(values), generator=generator)[:_VALUES].to(values.device)
        batches = [dataset.take(part) for part in judging.split(size)]
        return cls(layer, unit, make_objective("squared_error", [layer]), batches, values[chosen])

    def error(self) -> float:
        # Measuring uses targets up, and units may change their arguments.
        return mean_error(self.unit, [self.objective], (tree_map(_copy, batch) for batch in self.judging))


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _channels_last(layer: QuantizedLayer, batch: MiniBatch) -> Tensor:
    """Values of a layer's input, shape (n, channels); padding left out."""
    x = next(leaf for leaf in tree_leaves(batch.call) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    axis = layer.type.operands[0].channel_axis
    assert axis is not None
    values = x.detach().float().movedim(axis, -1)
    for weight in batch.importance or ():
        if axis == -1 and weight.dim() == x.dim() and weight.shape[:-1] == x.shape[:-1]:
            return values[(weight > 0).any(-1)]
    return values.reshape(-1, values.shape[-1])


def _equalize(
    tensor: ObservedTensor, readers: Sequence[_Reader], absorbed_by: str, options: EqualizationOptions
) -> EqualizedInput:
    """Try the exponents on one tensor and leave its layers at the best."""
    layers = [reader.layer for reader in readers]
    described = _format(layers[0])
    assert described is not None
    spec, channels = described
    values = readers[0].values
    spread = _relative_ranges(values, spec)
    free = all(is_free(layer.module, layer.type, layer.latent()[0]) for layer in layers)
    states = best_states = [layer.save() for layer in layers]
    chosen, before = 0.0, sum(reader.error() for reader in readers)
    best = before
    for exponent in (1.0,) if free else options.exponents:
        ratio = spread.pow(exponent)
        for layer in layers:
            layer.equalize(channels, ratio)
        quantizer = layers[0].input_quantizers[0]
        assert isinstance(quantizer, AffineQuantizer)
        observer = make_observer(layers[0].range_options).to(values.device)
        observer.update(values / ratio)
        quantizer.set_range(*observer.compute_range(quantizer.spec))
        error = sum(reader.error() for reader in readers)
        if error < best:
            chosen, best, best_states = exponent, error, [layer.save() for layer in layers]
        for layer, state in zip(layers, states, strict=True):
            layer.restore(state)
    for layer, state in zip(layers, best_states, strict=True):
        layer.restore(state)
    return EqualizedInput(tensor.name, tuple(layer.name for layer in layers), absorbed_by, chosen, before, best)


def _relative_ranges(values: Tensor, spec: TensorSpec) -> Tensor:
    """Width of the range that loses least of each channel, over the geometric mean of all; 1 for dead channels.

    Args:
        values: Shape (n, channels).
        spec: Format of the input.
    """
    rows = values.t().contiguous()
    low, high = lp_optimal_range(rows, None, rows.amin(1), rows.amax(1), spec, 2.0)
    width = torch.maximum(-low, high) if spec.symmetric else high - low
    alive = width > 0
    logs = torch.where(alive, width, 1.0).log()
    mean = logs.sum() / max(int(alive.sum()), 1)
    most = math.log(_MOST)
    return torch.where(alive, (logs - mean).clamp(-most, most), 0.0).exp()
