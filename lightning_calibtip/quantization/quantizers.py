"""Quantizers: modules that hold the parameters of one tensor's quantization and apply it; one class a kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .groups import groups_per_channel
from .spec import PerChannel, PerGroup, PerToken, TensorSpec

_KINDS: dict[str, "type[Quantizer]"] = {}
_Kind = TypeVar("_Kind", bound="type[Quantizer]")


class Trainable(NamedTuple):
    """A parameter of a quantizer that reconstruction learns.

    Args:
        parameter: The parameter.
        step: Change of the parameter that moves the end of the range by one quantization step; 1 for a zero point. A
            number, or a tensor that has one for each element.
        role: ``"scale"``, ``"zero_point"`` or ``"ratio"``, which say which learning rate it has.

    Example:
        See ``AffineQuantizer``.
    """

    parameter: Tensor
    step: float | Tensor
    role: str


class Quantizer(nn.Module, ABC):
    """Fake-quantizes what passes through it, once it is enabled.

    A kind of quantizer is a subclass with ``register_quantizer``. Its parameters have no gradients of their own accord;
    they are saved, moved and, during reconstruction, learned like any other.

    Args:
        name: Name of the tensor, for messages: ``"layer1.0.conv1 weight"``.
        spec: Format of the tensor.
        rows: Number of parts of the tensor that have a range each.

    Example:
        See ``AffineQuantizer``, and ``register_quantizer`` for a kind of one's own.

    Attributes:
        is_simulation: Whether no engine computes with tensors of this kind; targets then refuse it.
    """

    is_simulation = False

    def __init__(self, name: str, spec: TensorSpec, rows: int) -> None:
        super().__init__()
        self.name, self.spec, self.rows = name, spec, rows
        self.enabled = False

    @classmethod
    def parse_options(cls, given: Mapping[str, Any], channel_axis: int | None) -> dict[str, Any]:
        """Check the options that a user has given for tensors of this kind; a kind without options refuses all.

        Args:
            given: Options by name.
            channel_axis: Dimension that a layer sums over, counted from the last, where it is known.

        Returns:
            What ``TensorSpec.options`` is to hold.

        Raises:
            ValueError: If an option does not exist or is out of its range.
        """
        if given:
            raise ValueError(f"{cls.__name__} has no options, got {', '.join(map(str, given))}.")
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, fake-quantized when enabled."""
        return self.fake_quantize(x) if self.enabled else x

    @abstractmethod
    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Take the parameters from a real range.

        Args:
            minimum: Smallest values, shape (rows,).
            maximum: Greatest values, shape (rows,).

        Raises:
            ValueError: If an end is not finite.
        """

    @abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """Replace each element by the value that its integer stands for; differentiable."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Encode a tensor as integers from ``spec.qmin`` to ``spec.qmax``, of the shape of ``x`` and any integer
        type."""

    @abstractmethod
    def decode(self, q: Tensor) -> Tensor:
        """Decode integers as real numbers (float32)."""

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and greatest value that can be represented, each of shape (rows,)."""

    @abstractmethod
    def step_size(self) -> float:
        """Typical distance of neighbouring values, which learning rates of a weight are fractions of."""

    def unrounded(self, x: Tensor) -> Tensor:
        """What the quantized tensor would be if nothing were rounded: ``x`` itself, unless its channels are
        equalized."""
        return x

    def trainables(self) -> list[Trainable]:
        """Parameters that reconstruction learns; none by default."""
        return []

    def clamp_(self) -> None:
        """Bring the parameters back into their valid range, after each step of an optimiser."""

    def finalize_(self) -> None:
        """Make the parameters what they act as, at the end of reconstruction."""

    def rescale_(self, factor: Tensor) -> bool:
        """Multiply the values that the integers of each output channel stand for, if the kind can.

        Args:
            factor: Positive, one element for each output channel.

        Returns:
            Whether it was done.
        """
        return False

    def limits(self, parameter: str) -> tuple[float, float] | None:
        """Least and greatest value that a parameter may have in a file; None if any may be there."""
        return None

    def shares(self) -> dict[str, float]:
        """Shares, from 0 to 1, of the values that have passed, which the report shows by tensor; none by default."""
        return {}

    def stored(self) -> dict[str, Tensor]:
        """Parameters that an engine has to store, by name; the others are what a new quantizer has."""
        return dict(self.named_parameters())

    def parameter_bytes(self) -> int:
        """Bytes of the parameters that an engine has to store."""
        return sum(parameter.nbytes for parameter in self.stored().values())

    def extra_repr(self) -> str:
        """Describe the quantizer for ``print(model)``."""
        match self.spec.granularity:
            case PerToken():
                where = "per token"
            case PerChannel(axis):
                where = f"per channel of axis {axis}"
            case PerGroup(size):
                where = f"in groups of {size}"
            case _:
                where = "per tensor"
        kind = self.spec.kind
        if self.spec.symmetric:
            kind = "symmetric" if kind == "affine" else f"symmetric {kind}"
        return f"{self.spec.bits} bits, {kind}, {where}, {'enabled' if self.enabled else 'disabled'}"


def register_quantizer(kind: str) -> Callable[[_Kind], _Kind]:
    """Register a class as the quantizer of ``TensorSpec.kind``.

    Args:
        kind: Name of the kind, for ``QuantizationScheme(weight_quantizer=..., activation_quantizer=...)``.

    Returns:
        Decorator for a subclass of ``Quantizer`` with the same arguments.

    Example:
        >>> from lightning_calibtip.quantization.affine_quantizer import AffineQuantizer
        >>> @register_quantizer("power_of_two_scale")
        ... class PowerOfTwoScale(AffineQuantizer):
        ...     def choose_qparams(self, minimum, maximum):
        ...         scale, zero_point = super().choose_qparams(minimum, maximum)
        ...         return scale.log2().ceil().exp2(), zero_point
        ...     def trainables(self):
        ...         return []
        >>> quantizer = make_quantizer("x", TensorSpec(4, kind="power_of_two_scale"), None, torch.device("cpu"))
        >>> with torch.no_grad():
        ...     quantizer.set_range(torch.tensor([0.0]), torch.tensor([10.0]))
        >>> quantizer.scale.item()
        1.0
    """

    def register(cls: _Kind) -> _Kind:
        _KINDS[kind] = cls
        return cls

    return register


def check_kind(kind: str, what: str) -> str:
    """Return ``kind`` if it is registered.

    Raises:
        ValueError: If it is not; the message names ``what`` and the registered kinds.

    Example:
        >>> check_kind("affine", "weight_quantizer")
        'affine'
    """
    if kind not in _KINDS:
        raise ValueError(f"{what} must be one of {', '.join(_KINDS)}, got {kind!r}; register_quantizer adds a kind.")
    return kind


def is_simulation(kind: str) -> bool:
    """Whether no engine computes with tensors of a kind.

    Example:
        >>> is_simulation("affine"), is_simulation("sparq")
        (False, True)
    """
    return _KINDS[kind].is_simulation


def kind_options(kind: str, given: Mapping[str, Any], channel_axis: int | None = None) -> tuple[tuple[str, Any], ...]:
    """Options of a kind as ``TensorSpec`` holds them.

    Args:
        kind: Name of the kind.
        given: Options by name, as the user has given them.
        channel_axis: See ``Quantizer.parse_options``.

    Raises:
        ValueError: If the kind has no such option, or a value is out of its range.

    Example:
        >>> kind_options("sparq", {"windows": 3}, channel_axis=-1)
        (('axis', -1), ('pairs', True), ('windows', 3))
    """
    return tuple(sorted(_KINDS[kind].parse_options(given, channel_axis).items()))


def make_quantizer(name: str, spec: TensorSpec, shape: Sequence[int] | None, device: torch.device) -> Quantizer:
    """Make a (disabled) quantizer of the kind that a spec names.

    Args:
        name: Name of the tensor.
        spec: Its format.
        shape: Its shape; None for an activation, which has one range.
        device: Device of the parameters.

    Raises:
        ValueError: If the kind is not registered.

    Example:
        >>> make_quantizer("fc weight", TensorSpec(4, granularity=PerGroup(2)), (3, 5), torch.device("cpu")).rows
        9
    """
    check_kind(spec.kind, f"The kind of quantizer of {name}")
    rows = 1
    if shape is not None and isinstance(spec.granularity, PerChannel):
        rows = shape[spec.granularity.axis]
    elif shape is not None and isinstance(spec.granularity, PerGroup):
        axis = spec.granularity.axis
        rows = shape[axis] * groups_per_channel(shape, axis, spec.granularity.size)
    return _KINDS[spec.kind](name, spec, rows).to(device)
