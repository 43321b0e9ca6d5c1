"""How a tensor, and how a layer, is quantized: frozen values that can be compared, hashed, printed and stored."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

MIN_BITS, MAX_BITS = 2, 16

# Bits of a number that is not quantized.
FLOAT_BITS = 32


def _check_axis(axis: int) -> None:
    if isinstance(axis, bool) or not isinstance(axis, int) or axis < 0:
        raise ValueError(f"The axis of channels must be an integer of at least 0, got {axis!r}.")


def _check_names(values: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(f"{what} has no {', '.join(unknown)}: it was written by a later release.")


def check_bits(bits: int, what: str) -> int:
    """Return ``bits`` if it is an integer from 2 to 16.

    Raises:
        ValueError: If it is not; the message names ``what``, the value and the allowed range.

    Example:
        >>> check_bits(4, "weight_bits")
        4
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{what} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}.")
    return bits


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor.

    Example:
        >>> PerTensor()
        PerTensor()
    """


@dataclass(frozen=True)
class PerChannel:
    """One scale for each channel.

    Args:
        axis: Dimension that runs over channels, 0 or greater.

    Raises:
        ValueError: If the axis is below 0.

    Example:
        >>> PerChannel(axis=1)
        PerChannel(axis=1)
    """

    axis: int = 0

    def __post_init__(self) -> None:
        _check_axis(self.axis)


@dataclass(frozen=True)
class PerGroup:
    """One scale for each group of consecutive elements of a channel, whose other dimensions are flattened.

    Args:
        size: Number of elements of a group, at least 1; the last group of a channel may be shorter.
        axis: Dimension that runs over channels, 0 or greater.

    Raises:
        ValueError: If the size is below 1, or the axis below 0.

    Example:
        >>> PerGroup(32)
        PerGroup(size=32, axis=0)
    """

    size: int
    axis: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"The size of a group must be an integer of at least 1, got {self.size!r}.")
        _check_axis(self.axis)


@dataclass(frozen=True)
class PerToken:
    """One range for each token, taken from its own values at run time.

    Args:
        axes: Dimensions that a range spans, counted from the last.

    Example:
        >>> PerToken()
        PerToken(axes=(-1,))
    """

    axes: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        # A list, of YAML or JSON, could not be hashed.
        object.__setattr__(self, "axes", tuple(self.axes))


@dataclass(frozen=True)
class Channels:
    """Channels of an equalized activation: each is divided by a ratio of its own before it is rounded.

    All are read back with the one scale of the tensor, so integer arithmetic stays per tensor; the weights that the
    channels are multiplied with have the ratios as factors.

    Args:
        axis: Dimension that runs over channels, counted from the last, below 0.
        count: Number of channels, at least 1.
        inverse: Whether they are multiplied by the ratios instead: those of the other operand of a product, whose
            channels are divided by the same ratios.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> Channels(axis=-1, count=64)
        Channels(axis=-1, count=64, inverse=False)
    """

    axis: int
    count: int
    inverse: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis >= 0:
            raise ValueError(f"The axis of equalized channels is counted from the last, below 0, got {self.axis!r}.")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"The number of equalized channels must be at least 1, got {self.count!r}.")


Granularity = PerTensor | PerChannel | PerGroup | PerToken

_GRANULARITIES: dict[str, type[Granularity]] = {
    "per_tensor": PerTensor,
    "per_channel": PerChannel,
    "per_group": PerGroup,
    "per_token": PerToken,
}


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized. A tensor that is not quantized has no spec: None.

    Args:
        bits: Bit-width, 2 to 16.
        symmetric: Whether the integers are signed and the zero point is 0.
        granularity: Which elements share a scale.
        kind: Kind of the quantizer, see ``register_quantizer``.
        one_sided: Whether a symmetric range without negative values (after a ReLU) may put its zero point at the
            smallest integer instead of wasting half of the integers.
        nonnegative: Whether the tensor is never negative (probabilities), so that its range begins at zero and its
            zero point is and stays 0; such a tensor is not symmetric.
        equalized: Channels that are divided by a ratio each before they are rounded; None where there are none. Only
            an activation with one scale, or with ranges taken at run time, has some.
        options: Options of the kind of quantizer, as pairs of names and values in the order of the names.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> spec = TensorSpec(4, symmetric=True, granularity=PerGroup(32))
        >>> spec.qmin, spec.qmax, TensorSpec.from_dict(spec.to_dict()) == spec
        (-8, 7, True)
    """

    bits: int = 8
    symmetric: bool = False
    granularity: Granularity = PerTensor()
    kind: str = "affine"
    one_sided: bool = False
    nonnegative: bool = False
    equalized: Channels | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits")
        if not isinstance(self.kind, str) or not self.kind:
            raise ValueError(f"kind must be the name of a registered kind of quantizer, got {self.kind!r}.")
        if not isinstance(self.granularity, Granularity):
            raise ValueError(
                f"granularity must be a PerTensor, PerChannel, PerGroup or PerToken object, got {self.granularity!r}."
            )
        if self.symmetric and self.nonnegative:
            raise ValueError("A nonnegative tensor has unsigned integers: symmetric must be False, got True.")
        if self.equalized is not None and not isinstance(self.granularity, PerTensor | PerToken):
            raise ValueError(
                f"Equalized channels share one scale: granularity must be PerTensor, got {self.granularity!r}."
            )

    @property
    def qmin(self) -> int:
        """Smallest integer that a value may be encoded as."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Greatest integer that a value may be encoded as."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def dynamic(self) -> bool:
        """Whether ranges are taken at run time."""
        return isinstance(self.granularity, PerToken)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, which ``from_dict`` reads."""
        name = next(name for name, cls in _GRANULARITIES.items() if type(self.granularity) is cls)
        fields = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.granularity).items()}
        values = {**asdict(self), "granularity": {"name": name, **fields}, "options": dict(self.options)}
        # Earlier releases read what has none.
        return {key: value for key, value in values.items() if key != "options" or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TensorSpec":
        """Convert back what ``to_dict`` gave.

        Raises:
            ValueError: If a name is unknown; the message says which.
        """
        _check_names(values, cls.__dataclass_fields__, "A tensor's spec")
        fields = dict(values["granularity"])
        name = fields.pop("name", None)
        if name not in _GRANULARITIES:
            raise ValueError(f"The granularity of a tensor must be one of {', '.join(_GRANULARITIES)}, got {name!r}.")
        granularity = _GRANULARITIES[name]
        _check_names(fields, granularity.__dataclass_fields__, f"The granularity {name}")
        channels = values.get("equalized")
        equalized = None if channels is None else Channels(**channels)
        options = tuple(sorted(values.get("options", {}).items()))
        return cls(**{**values, "granularity": granularity(**fields), "equalized": equalized, "options": options})


@dataclass(frozen=True)
class BitWidths:
    """Bit-widths of a layer's weight and inputs: the short form of a candidate. None stands for float.

    Args:
        weight: Bit-width of the weight.
        activation: Bit-width of the inputs.

    Example:
        >>> BitWidths(4, 8).label, BitWidths(4, None).label, BitWidths(4, None).total
        ('W4A8', 'W4', 36)
    """

    weight: int | None
    activation: int | None

    @property
    def label(self) -> str:
        """Name in the field's notation, ``"W4A8"``; ``"float"`` if neither is quantized."""
        weight = "" if self.weight is None else f"W{self.weight}"
        activation = "" if self.activation is None else f"A{self.activation}"
        return f"{weight}{activation}" or "float"

    @property
    def total(self) -> int:
        """Sum of both, where float counts 32 bits."""
        return sum(FLOAT_BITS if bits is None else bits for bits in (self.weight, self.activation))

    @property
    def sort_key(self) -> tuple[int, int]:
        """Key that orders by the weight's bits and then the activation's, float last."""
        weight, activation = (FLOAT_BITS if bits is None else bits for bits in (self.weight, self.activation))
        return weight, activation


@dataclass(frozen=True)
class LayerConfig:
    """What happens to one layer; None stands for a tensor in float.

    Args:
        weight: Spec of the weight.
        inputs: Spec of each operand.
        output: Spec of the output.
        integer_bias: Whether the bias is a whole number of the products' steps (scale of the input times scale of the
            weight), as engines add it to sums of integers; for layers with one quantized input.

    Example:
        >>> config = LayerConfig(TensorSpec(4, granularity=PerChannel(0)), (None,))
        >>> config.bit_widths.label, config.is_float, LayerConfig.from_dict(config.to_dict()) == config
        ('W4', False, True)
    """

    weight: TensorSpec | None = None
    inputs: tuple[TensorSpec | None, ...] = ()
    output: TensorSpec | None = None
    integer_bias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))

    @property
    def bit_widths(self) -> BitWidths:
        """Effective bit-widths: that of the weight, and that of the first input that is quantized."""
        activation = next((spec.bits for spec in self.inputs if spec is not None), None)
        return BitWidths(None if self.weight is None else self.weight.bits, activation)

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return all(spec is None for spec in (self.weight, *self.inputs, self.output))

    @property
    def without_equalization(self) -> "LayerConfig":
        """The same format with inputs whose channels are not equalized."""
        inputs = tuple(None if spec is None else replace(spec, equalized=None) for spec in self.inputs)
        return replace(self, inputs=inputs)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, which ``from_dict`` reads."""
        weight, *inputs, output = (
            None if spec is None else spec.to_dict() for spec in (self.weight, *self.inputs, self.output)
        )
        return {"weight": weight, "inputs": inputs, "output": output, "integer_bias": self.integer_bias}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerConfig":
        """Convert back what ``to_dict`` gave.

        Raises:
            ValueError: If a name is unknown; the message says which.
        """
        _check_names(values, cls.__dataclass_fields__, "A layer's config")
        weight, *inputs, output = (
            None if spec is None else TensorSpec.from_dict(spec)
            for spec in (values["weight"], *values["inputs"], values["output"])
        )
        return cls(weight, tuple(inputs), output, values.get("integer_bias", False))


def parse_bit_widths(
    value: "int | Sequence[int | None] | BitWidths",
    what: str,
    quantizes_weights: bool = True,
    quantizes_activations: bool = True,
) -> BitWidths:
    """Bit-widths that a user's value stands for.

    Args:
        value: One number, for whatever is quantized; a pair ``(weight_bits, activation_bits)`` with None for float; or
            ``BitWidths``.
        what: Name of the value, for the message.
        quantizes_weights: Whether one number counts for weights.
        quantizes_activations: Whether one number counts for activations.

    Raises:
        ValueError: If the value is neither, or a bit-width is out of its range; the message names ``what``.

    Example:
        >>> parse_bit_widths(4, "bits").label, parse_bit_widths([4, None], "bits").label
        ('W4A4', 'W4')
        >>> parse_bit_widths(4, "bits", quantizes_activations=False).label
        'W4'
    """
    if isinstance(value, int) and not isinstance(value, bool):
        bits = check_bits(value, what)
        return BitWidths(bits if quantizes_weights else None, bits if quantizes_activations else None)
    if isinstance(value, BitWidths):
        weight, activation = value.weight, value.activation
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        weight, activation = value
    else:
        raise ValueError(f"{what} must be a bit-width or a pair (weight_bits, activation_bits), got {value!r}.")
    for given in (weight, activation):
        if given is not None:
            check_bits(given, what)
    if weight is None and activation is None:
        raise ValueError(f"{what} must quantize the weight or the activation, got {value!r}.")
    return BitWidths(weight, activation)
