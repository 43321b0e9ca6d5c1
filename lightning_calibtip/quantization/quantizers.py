"""Quantizers: modules that hold the parameters of one tensor's quantization and apply it; one class a kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .affine import SMALLEST_SCALE, along, choose_qparams, decode, encode, fake_quantize, in_parts
from .groups import from_groups, groups_per_channel, to_groups
from .packing import narrowest
from .spec import PerChannel, PerGroup, PerToken, TensorSpec

# Ratios of equalized channels are at least this much, lest a channel be divided by next to nothing.
SMALLEST_RATIO = 1e-6

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
    """

    def __init__(self, name: str, spec: TensorSpec, rows: int) -> None:
        super().__init__()
        self.name, self.spec, self.rows = name, spec, rows
        self.enabled = False

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


@register_quantizer("affine")
class AffineQuantizer(Quantizer):
    """Uniform quantization with a scale and a zero point for each row.

    Args:
        name: Name of the tensor.
        spec: Its format.
        rows: Number of scales.

    Example:
        >>> quantizer = AffineQuantizer("x", TensorSpec(bits=2), rows=1)
        >>> with torch.no_grad():
        ...     quantizer.set_range(torch.tensor([-1.0]), torch.tensor([2.0]))
        >>> quantizer.fake_quantize(torch.tensor([-3.0, 0.4, 1.7])).tolist()
        [-1.0, 0.0, 2.0]
        >>> [(trainable.role, round(trainable.step, 4)) for trainable in quantizer.trainables()]
        [('scale', 0.3333), ('zero_point', 1.0)]
    """

    scale: Tensor
    zero_point: Tensor
    ratio: Tensor | None

    def __init__(self, name: str, spec: TensorSpec, rows: int) -> None:
        super().__init__(name, spec, rows)
        self.scale = nn.Parameter(torch.ones(rows, dtype=torch.float32), requires_grad=False)
        self.zero_point = nn.Parameter(torch.zeros(rows, dtype=torch.float32), requires_grad=False)
        ratio = None if spec.equalized is None else torch.ones(spec.equalized.count, dtype=torch.float32)
        self.register_parameter("ratio", None if ratio is None else nn.Parameter(ratio, requires_grad=False))

    @property
    def acts_as_stored(self) -> bool:
        """Whether any scale may be stored and acts as it is: not in kinds that restrict or change what acts."""
        names = ("choose_qparams", "set_range", "fake_quantize", "encode", "decode", "finalize_")
        return all(getattr(type(self), name) is getattr(AffineQuantizer, name) for name in names)

    def choose_qparams(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Choose scale and zero point of a range, of calibration or of a token; to override in a kind of one's own."""
        return choose_qparams(minimum, maximum, self.spec)

    @torch.no_grad()
    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """See ``Quantizer`` and ``choose_qparams``."""
        if not bool(torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
            raise ValueError(f"{self.name}: the range has a NaN or infinite end; check the data and the weights.")
        scale, zero_point = self.choose_qparams(minimum, maximum)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See ``Quantizer`` and ``affine.fake_quantize``."""
        spec, ratio = self.spec, self._ratio(x)
        if isinstance(spec.granularity, PerToken):
            axes, even = spec.granularity.axes, self.unrounded(x).detach()
            scale, zero_point = self.choose_qparams(even.amin(axes, keepdim=True), even.amax(axes, keepdim=True))
            return fake_quantize(x, scale, zero_point, spec.qmin, spec.qmax, None, ratio)
        rows, axis = self._rows(x)
        output = fake_quantize(rows, self.scale, self.zero_point, spec.qmin, spec.qmax, axis, ratio)
        return self._whole(output, x)

    def encode(self, x: Tensor) -> Tensor:
        """See ``Quantizer`` and ``affine.encode``."""
        rows, axis = self._rows(x)
        spec, ratio = self.spec, self._ratio(x)
        integers = torch.empty(rows.shape, dtype=narrowest(spec.qmin, spec.qmax), device=x.device)
        for part, parameters in in_parts(rows, self.scale.detach(), self.zero_point.detach(), axis):
            of_part = ratio if ratio is None or ratio.shape[0] == 1 else ratio[part]
            encoded = encode(rows[part], *parameters, spec.qmin, spec.qmax, axis, ratio=of_part)
            integers[part] = encoded.to(integers.dtype)
        return self._whole(integers, x)

    def unrounded(self, x: Tensor) -> Tensor:
        """See ``Quantizer``: ``x`` with each channel divided by its ratio."""
        ratio = self._ratio(x)
        return x if ratio is None else (x / ratio).to(x.dtype)

    @property
    def divisors(self) -> Tensor | None:
        """What channels are divided by, shape (channels,): ratios, or one over them, see ``Channels``; None without."""
        channels, ratio = self.spec.equalized, self.ratio
        return ratio.reciprocal() if ratio is not None and channels is not None and channels.inverse else ratio

    def _ratio(self, x: Tensor) -> Tensor | None:
        """The divisors so that they run along the channels of ``x``, if these are equalized."""
        if self.spec.equalized is None or (divisors := self.divisors) is None:
            return None
        return along(divisors.float(), x.dim(), self.spec.equalized.axis % x.dim())

    def decode(self, q: Tensor) -> Tensor:
        """See ``Quantizer`` and ``affine.decode``."""
        rows, axis = self._rows(q)
        decoded = torch.empty(rows.shape, dtype=torch.float32, device=q.device)
        for part, parameters in in_parts(rows, self.scale.detach(), self.zero_point.detach(), axis):
            decoded[part] = decode(rows[part], *parameters, self.spec.qmin, self.spec.qmax, axis)
        return self._whole(decoded, q)

    def elementwise(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each element of a tensor of a shape."""
        like = self.scale.new_empty(tuple(shape))
        rows, axis = self._rows(like)
        scale, zero_point = (along(each.detach(), rows.dim(), axis) for each in (self.scale, self.zero_point))
        return self._whole(scale.expand(rows.shape), like), self._whole(zero_point.expand(rows.shape), like)

    def _rows(self, x: Tensor) -> tuple[Tensor, int | None]:
        """The tensor so that scales run along an axis, and that axis."""
        granularity = self.spec.granularity
        if isinstance(granularity, PerGroup):
            return to_groups(x, granularity.axis, granularity.size), 0
        return x, granularity.axis if isinstance(granularity, PerChannel) else None

    def _whole(self, rows: Tensor, x: Tensor) -> Tensor:
        """The inverse, for a tensor of the shape of ``x``."""
        granularity = self.spec.granularity
        return from_groups(rows, x.shape, granularity.axis) if isinstance(granularity, PerGroup) else rows

    def range(self) -> tuple[Tensor, Tensor]:
        """See ``Quantizer``."""
        scale, zero_point = self.scale.detach(), self.zero_point.detach()
        ends = (torch.full_like(scale, end) for end in (self.spec.qmin, self.spec.qmax))
        low, high = (decode(end, scale, zero_point, self.spec.qmin, self.spec.qmax) for end in ends)
        return low, high

    def step_size(self) -> float:
        """Median of the scales: that of a dead channel is 1, whatever the others are."""
        return float(self.scale.detach().median())

    def trainables(self) -> list[Trainable]:
        """Scale, zero point where it may move, and ratios of channels; of ranges that are taken at run time, only
        these."""
        steps = self.spec.qmax - self.spec.qmin
        # Those that are shared belong to the first operand's quantizer.
        own = None if self.divisors is not self.ratio else self.ratio
        found = [] if own is None else [Trainable(own, own.detach() / steps, "ratio")]
        if self.spec.dynamic:
            return found
        found.append(Trainable(self.scale, self.step_size() / steps, "scale"))
        if not (self.spec.symmetric or self.spec.nonnegative):
            found.append(Trainable(self.zero_point, 1.0, "zero_point"))
        return found

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep scales and ratios positive."""
        self.scale.clamp_min_(SMALLEST_SCALE)
        if self.ratio is not None:
            self.ratio.clamp_min_(SMALLEST_RATIO)

    def limits(self, parameter: str) -> tuple[float, float] | None:
        """See ``Quantizer``: scales and ratios are positive, zero points within the range of the integers."""
        positive = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)
        ends = (float(self.spec.qmin), float(self.spec.qmax))
        return {"scale": positive, "ratio": positive, "zero_point": ends}.get(parameter)

    @torch.no_grad()
    def finalize_(self) -> None:
        """Make the zero point the whole number that has acted all along."""
        self.zero_point.copy_(self.zero_point.round().clamp(self.spec.qmin, self.spec.qmax))

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> bool:
        """Multiply the scales of each channel; impossible with one scale for the whole tensor, or restricted scales."""
        granularity = self.spec.granularity
        of_groups = isinstance(granularity, PerGroup) and self.rows % len(factor) == 0
        of_channels = isinstance(granularity, PerChannel) and self.rows == len(factor)
        if not (of_groups or of_channels) or not self.acts_as_stored:
            return False
        self.scale.mul_(factor.repeat_interleave(self.rows // len(factor)))
        return True

    def stored(self) -> dict[str, Tensor]:
        """Scales, zero points where they are not known to be zero, and ratios; of ranges that are taken at run time,
        only these."""
        ratios = {} if self.ratio is None else {"ratio": self.ratio}
        if self.spec.dynamic:
            return ratios
        is_zero = (self.spec.symmetric and not self.spec.one_sided) or self.spec.nonnegative
        return {"scale": self.scale, **({} if is_zero else {"zero_point": self.zero_point}), **ratios}
