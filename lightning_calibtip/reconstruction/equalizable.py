"""Which inputs may be equalized, and the options of equalization."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..network.channels import channel_count
from ..network.dataflow import source_of
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.scheme import QuantizationScheme
from ..network.structure import Structure
from ..network.tensors import ObservedTensor
from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.spec import Channels

# An engine writes their results as integers, with one scale.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

ABSORB = ("prefer", "engine", "only")


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
        samples: Number of calibration samples that are looked at, at least 2, the first ones in whole batches: half of
            them give the ranges, half decide.
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


def equalizable_inputs(network: QuantizedNetwork) -> list[tuple[ObservedTensor, list[QuantizedLayer], Channels]]:
    """The tensors whose channels can be equalized, each with all layers that read it, and with its channels.

    Layers that the first batch does not reach cannot be judged.

    Args:
        network: Calibrated network.
    """
    assert network.structure is not None
    owners = {layer.tied_to.name for layer in network.layers.values() if layer.tied_to}
    readers: dict[ObservedTensor, list[QuantizedLayer]] = {}
    for layer in network.layers.values():
        for tensor in dict.fromkeys(layer.tensors):
            readers.setdefault(tensor, []).append(layer)
    found = []
    for tensor, layers in readers.items():
        if any(layer.name not in network.structure.calls_of for layer in layers):
            continue
        channels = {_channels(layer, network.structure) for layer in layers}
        formats = {layer.config.inputs[:1] for layer in layers}
        (common, *_) = channels
        if len(formats) > 1 or len(channels) > 1 or common is None or owners & {layer.name for layer in layers}:
            continue
        # The second operand of a product follows the first.
        if all(tensor is layer.tensors[0] for layer in layers):
            found.append((tensor, layers, common))
    return found


def may_divide(network: QuantizedNetwork, layers: Sequence[QuantizedLayer], absorb: str | None) -> bool:
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


def _channels(layer: QuantizedLayer, structure: Structure) -> Channels | None:
    """Channels of a layer's first input, if these can be equalized."""
    quantizers = layer.input_quantizers
    axis = layer.type.operands[0].channel_axis if layer.type.operands else None
    if axis is None or not all(isinstance(each, AffineQuantizer) and each.acts_as_stored for each in quantizers):
        return None
    if layer.type.is_product:
        shapes = {call.operands[0].view[1] for call in structure.calls_of[layer.name] if call.operands[0] is not None}
        counts = {shape[axis] for shape in shapes}
        alone = len(set(layer.tensors)) == 2 and not any(tensor.shared for tensor in layer.tensors)
        return Channels(axis, counts.pop()) if alone and len(counts) == 1 else None
    if len(quantizers) != 1 or layer.type.input_axis is None or not layer.has_weight:
        return None
    return Channels(axis, channel_count(layer.module, layer.type, layer.latent()[0]))
