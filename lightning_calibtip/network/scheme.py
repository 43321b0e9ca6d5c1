"""The user's choice of bit-widths and number formats, and what it means for a layer of a given type."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..quantization.quantizers import check_kind, kind_options
from ..quantization.spec import (
    BitWidths,
    Granularity,
    LayerConfig,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    TensorSpec,
    check_bits,
    parse_bit_widths,
)
from .layer_types import LayerType, Operand, names_operations
from .targets import Target, find_target

# What the user may write for the bit-widths of a layer: one number, or weights and activations apart.
Override = int | Sequence[int | None] | None


@dataclass(frozen=True)
class QuantizationScheme:
    """Bit-widths and number formats of a whole model.

    Args:
        weight_bits: Bit-width of weights, 2 to 16; None leaves weights in float.
        activation_bits: Bit-width of the layers' inputs, 2 to 16; None leaves activations in float (weight-only
            quantization).
        edge_bits: Bit-width of whatever is quantized (weights, inputs) in the first and the last layer that run; None
            treats them like the rest.
        overrides: Bit-widths by layer name or pattern (``fnmatch``: ``"layer1.*"``). One number stands for whatever the
            scheme quantizes, a pair ``(weight_bits, activation_bits)`` for each apart, with None for float, and None
            leaves the layer in float. Where several patterns match, the last one counts.
        target: Name of the engine that the model is made for, which decides about symmetric weights, unsigned
            activations and what is quantized between layers, and what is refused: ``"onnxruntime"``, ``"openvino"``,
            ``"tensorrt"``, ``"xnnpack"``, ``"weights"`` (integers in storage only), or one of your own, see
            ``register_target``; None for no engine in particular.
        symmetric: Whether weights use signed integers with a zero point of 0; None leaves it to the target, and without
            one means no.
        per_channel: Whether weights have a scale for each output channel.
        group_size: Number of consecutive weights of an output channel, along its flattened input dimensions, that share
            one scale (32, 64 and 128 are usual; the last group of a channel may be shorter); None for no groups.
        activation_symmetric: Whether the layers' inputs use signed integers; where an input is never negative, its zero
            point is the smallest integer.
        per_token: Whether each token of a layer's input (each sample of a convolution's) gets the range of its own
            values at run time, in place of one calibrated range.
        weight_quantizer: Kind of the weights' quantizers, see ``register_quantizer``.
        activation_quantizer: Kind of the activations' quantizers: ``"affine"``, ``"sparq"`` (see ``SparqQuantizer``) or
            one of your own.
        activation_options: Options of that kind by name: ``{"windows": 3}``.

    Raises:
        ValueError: If a bit-width is out of its range, nothing is quantized, groups are asked for without scales per
            channel, or the target is unknown or cannot run what is asked for.

    Example:
        >>> from lightning_calibtip.network.layer_types import LayerType
        >>> scheme = QuantizationScheme(weight_bits=4, activation_bits=None, group_size=32)
        >>> scheme.bit_widths(4, "candidates").label
        'W4'
        >>> scheme.config(LayerType(), scheme.bit_widths(4, "candidates")).weight.granularity
        PerGroup(size=32, axis=0)
    """

    weight_bits: int | None = 8
    activation_bits: int | None = 8
    edge_bits: int | None = 8
    overrides: Mapping[str, Override] | None = None
    target: str | None = None
    symmetric: bool | None = None
    per_channel: bool = True
    group_size: int | None = None
    activation_symmetric: bool = False
    per_token: bool = False
    weight_quantizer: str = "affine"
    activation_quantizer: str = "affine"
    activation_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "edge_bits"):
            if (bits := getattr(self, name)) is not None:
                check_bits(bits, name)
        if self.weight_bits is None and self.activation_bits is None:
            raise ValueError(
                "weight_bits and activation_bits are both None, so nothing would be quantized: give one of them a "
                "bit-width."
            )
        if self.group_size is not None and (
            isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 2
        ):
            raise ValueError(f"group_size must be an integer of at least 2, or None, got {self.group_size!r}.")
        if self.group_size is not None and not self.per_channel:
            raise ValueError(
                f"group_size={self.group_size} divides the weights of each output channel: it needs per_channel=True."
            )
        for name in ("symmetric", "per_channel", "activation_symmetric", "per_token"):
            if not isinstance(getattr(self, name), bool) and not (name == "symmetric" and self.symmetric is None):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        check_kind(self.weight_quantizer, "weight_quantizer")
        check_kind(self.activation_quantizer, "activation_quantizer")
        kind_options(self.activation_quantizer, self.activation_options or {})
        if self.overrides is not None and (
            not isinstance(self.overrides, Mapping) or not all(isinstance(pattern, str) for pattern in self.overrides)
        ):
            raise ValueError(
                "overrides must map names of layers, or patterns, to bit-widths ({'head': 8}), got "
                f"{self.overrides!r}."
            )
        for pattern, value in (self.overrides or {}).items():
            if value is not None:
                self.bit_widths(value, f"overrides[{pattern!r}]")
        if self.target is not None:
            find_target(self.target).check(self)

    @property
    def engine(self) -> Target | None:
        """The target that ``target`` names."""
        return None if self.target is None else find_target(self.target)

    def operation_bit_widths(self, name: str) -> BitWidths:
        """Bit-widths of an operation between layers by its name: the target's, where activations are quantized at
        all."""
        # Patterns for layers ("a*") are not meant for what lies between them.
        named = {p: value for p, value in (self.overrides or {}).items() if names_operations(p)}
        scheme = replace(self, overrides=named)
        if scheme.is_overridden(name):
            return replace(scheme.bit_widths_of(name, is_edge=False), weight=None)
        target = self.engine
        return BitWidths(None, target.between_bits if target and self.activation_bits is not None else None)

    def check_overrides(self, names: Sequence[str]) -> None:
        """Raise ``ValueError`` if an override matches none of the layers ``names``."""
        for pattern in self.overrides or {}:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"overrides[{pattern!r}] matches no quantizable layer; the layers are: "
                    f"{', '.join(names) or 'none'}."
                )

    def bit_widths(self, value: int | Sequence[int | None] | BitWidths, what: str) -> BitWidths:
        """Bit-widths that a user's value stands for; one number stands for whatever the scheme quantizes.

        Args:
            value: A number, a pair ``(weight_bits, activation_bits)``, or ``BitWidths``.
            what: Name of the value, for the message.

        Raises:
            ValueError: If the value is neither, or out of its range.
        """
        return parse_bit_widths(value, what, self.weight_bits is not None, self.activation_bits is not None)

    def is_overridden(self, name: str) -> bool:
        """Whether an override matches the layer."""
        return any(fnmatchcase(name, pattern) for pattern in self.overrides or {})

    def bit_widths_of(self, name: str, is_edge: bool) -> BitWidths:
        """Bit-widths of a layer by its name; None for both where an override leaves it in float."""
        matching = [(p, value) for p, value in (self.overrides or {}).items() if fnmatchcase(name, p)]
        if matching:
            pattern, value = matching[-1]
            return BitWidths(None, None) if value is None else self.bit_widths(value, f"overrides[{pattern!r}]")
        if is_edge and self.edge_bits is not None:
            return self.bit_widths(self.edge_bits, "edge_bits")
        return BitWidths(self.weight_bits, self.activation_bits)

    def config(self, layer_type: LayerType, bit_widths: BitWidths) -> LayerConfig:
        """Format of a layer of some type at given bit-widths, of which those that the type has no tensor for do not
        count."""
        weight = None
        if layer_type.channel_axis is not None and bit_widths.weight is not None:
            granularity = self._weight_granularity(layer_type.channel_axis)
            weight = TensorSpec(bit_widths.weight, bool(self.symmetric), granularity, self.weight_quantizer)
        return LayerConfig(
            weight, tuple(self.activation_spec(operand, bit_widths.activation) for operand in layer_type.operands)
        )

    def activation_spec(self, operand: Operand, bits: int | None) -> TensorSpec | None:
        """Format of an activation, None for float."""
        if bits is None:
            return None
        dynamic = self.per_token and bool(operand.dynamic_range_axes)
        return TensorSpec(
            bits,
            self.activation_symmetric and not operand.nonnegative,
            PerToken(operand.dynamic_range_axes) if dynamic else PerTensor(),
            self.activation_quantizer,
            one_sided=True,
            nonnegative=operand.nonnegative,
            options=kind_options(self.activation_quantizer, self.activation_options or {}, operand.channel_axis),
        )

    def _weight_granularity(self, channel_axis: int) -> Granularity:
        if self.group_size is not None:
            return PerGroup(self.group_size, channel_axis)
        return PerChannel(channel_axis) if self.per_channel else PerTensor()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint and for loggers."""
        overrides = {
            pattern: value if value is None or isinstance(value, int) else list(value)
            for pattern, value in (self.overrides or {}).items()
        }
        return {**asdict(self), "overrides": overrides}
