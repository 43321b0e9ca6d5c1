"""Uniform quantization of one tensor: a scale and a zero point for each row, and ratios of channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .affine import SMALLEST_SCALE, along, choose_qparams, decode, encode, fake_quantize, in_parts
from .groups import from_groups, to_groups
from .packing import narrowest
from .quantizers import Quantizer, Trainable, register_quantizer
from .spec import PerChannel, PerGroup, PerToken, TensorSpec

# Ratios of equalized channels are at least this much, lest a channel be divided by next to nothing.
SMALLEST_RATIO = 1e-6


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
