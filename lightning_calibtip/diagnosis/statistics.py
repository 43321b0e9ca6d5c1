"""What rounding does to one tensor: clipping, levels, outliers, and the mean that it shifts."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..quantization.quantizers import Quantizer

# Of tensors with more bits levels are not counted.
MOST_BITS = 8


@dataclass(frozen=True)
class TensorStatistics:
    """What rounding does to the values of one tensor.

    Args:
        error: Mean squared error of rounding over the mean square of the values.
        clipped: Share of the squared error that values outside the range make, 0 to 1; NaN where ranges are found at
            run time.
        used: Part of the range, from 0 to 1, that the values extend over; NaN likewise.
        levels: Number of levels that are in effective use: the exponential of the entropy of the integers, of values
            other than 0; NaN where they are not counted.
        available: Number of levels that there are.
        channel: Greatest magnitude of any channel over the median channel's, and the index of that channel; None where
            the tensor's channels are not known, or have ranges of their own.
        token: Greatest magnitude of any token over the median token's; None likewise.

    Example:
        See ``TensorObserver``.
    """

    error: float
    clipped: float
    used: float
    levels: float
    available: int
    channel: tuple[float, int] | None = None
    token: float | None = None


@dataclass
class TensorObserver:
    """Gathers ``TensorStatistics`` of a tensor, value by value.

    Args:
        quantizer: Quantizer of the tensor, with its range.
        channel_axis: Dimension that runs over channels, counted from the last; None if not known.
        has_tokens: Whether the dimensions before the last are samples and tokens.

    Example:
        >>> from lightning_calibtip.quantization.affine_quantizer import AffineQuantizer
        >>> from lightning_calibtip.quantization.spec import TensorSpec
        >>> quantizer = AffineQuantizer("x", TensorSpec(2, symmetric=True), rows=1)
        >>> observer = TensorObserver(quantizer, channel_axis=-1)
        >>> observer.update(torch.tensor([[0.5, 1.0], [0.0, -10.0]]))
        >>> statistics = observer.statistics()
        >>> round(statistics.clipped, 3), statistics.channel, statistics.available
        (0.996, (20.0, 1), 4)
    """

    quantizer: Quantizer
    channel_axis: int | None = None
    has_tokens: bool = False
    _squares: float = 0.0
    _errors: float = 0.0
    _clipped: float = 0.0
    _low: float = math.inf
    _high: float = -math.inf
    _counts: Tensor | None = None
    _channels: Tensor | None = None
    _tokens: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """See values of the tensor, as the layer is given them."""
        quantizer = self.quantizer
        values = quantizer.unrounded(x).float()
        squared = (quantizer.fake_quantize(x).float() - values).square()
        self._squares += float(values.square().sum(dtype=torch.float64))
        self._errors += float(squared.sum(dtype=torch.float64))
        magnitudes = values.abs()
        if self.channel_axis is not None and values.dim() >= -self.channel_axis:
            channels = magnitudes.movedim(self.channel_axis, 0).flatten(1).amax(1)
            self._channels = channels if self._channels is None else torch.maximum(self._channels, channels)
        if self.has_tokens and values.dim() > 2:
            self._tokens.append(magnitudes.amax(-1).flatten())
        if quantizer.spec.dynamic:
            return
        low, high = (float(end) for end in quantizer.range())
        # Half a step outside is rounded like all others.
        slack = (high - low) / (2 * (quantizer.spec.qmax - quantizer.spec.qmin))
        outside = (values < low - slack) | (values > high + slack)
        self._clipped += float(squared[outside].sum(dtype=torch.float64))
        least, greatest = torch.aminmax(values)
        self._low, self._high = min(self._low, float(least)), max(self._high, float(greatest))
        if quantizer.spec.bits <= MOST_BITS:
            counts = count_levels(quantizer, x)
            self._counts = counts if self._counts is None else self._counts + counts

    def statistics(self) -> TensorStatistics | None:
        """What was seen; None if nothing was."""
        if self._squares == 0.0:
            return None
        spec = self.quantizer.spec
        clipped = used = math.nan
        if not spec.dynamic:
            low, high = (float(end) for end in self.quantizer.range())
            clipped = self._clipped / self._errors if self._errors else 0.0
            used = max(0.0, min(self._high, high) - max(self._low, low)) / max(high - low, 1e-30)
        return TensorStatistics(
            error=self._errors / self._squares,
            clipped=clipped,
            used=used,
            levels=math.nan if self._counts is None else float(effective_levels(self._counts)),
            available=spec.qmax - spec.qmin + 1,
            channel=None if self._channels is None else outlier(self._channels),
            token=None if not self._tokens else outlier(torch.cat(self._tokens))[0],
        )


def outlier(magnitudes: Tensor) -> tuple[float, int]:
    """The greatest of some magnitudes over their median, and where it is. What is always 0 does not count.

    Args:
        magnitudes: One for each channel or token.

    Example:
        >>> outlier(torch.tensor([1.0, 2.0, 0.0, 20.0]))
        (10.0, 3)
    """
    used = magnitudes[magnitudes > 0]
    if not used.numel():
        return 1.0, 0
    return float(magnitudes.max() / used.median()), int(magnitudes.argmax())


def count_levels(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Count how often each integer stands for a value other than 0.

    Args:
        quantizer: Quantizer of the tensor.
        x: Values.

    Returns:
        Counts from ``qmin`` to ``qmax``, float64.

    Example:
        >>> from lightning_calibtip.quantization.affine_quantizer import AffineQuantizer
        >>> from lightning_calibtip.quantization.spec import TensorSpec
        >>> quantizer = AffineQuantizer("x", TensorSpec(2), rows=1)
        >>> count_levels(quantizer, torch.tensor([0.0, 1.0, 2.2, 9.0]))
        tensor([0., 1., 1., 1.], dtype=torch.float64)
    """
    spec = quantizer.spec
    integers = quantizer.encode(x)[x != 0].long() - spec.qmin
    return torch.bincount(integers, minlength=spec.qmax - spec.qmin + 1).double().cpu()


def effective_levels(counts: Tensor) -> Tensor:
    """The exponential of the entropy of integers: as many levels as would be in use if all were used alike.

    Args:
        counts: How often each integer occurs, along the last dimension.

    Returns:
        One number for each row; NaN where none occurs.

    Example:
        >>> effective_levels(torch.tensor([8.0, 8.0, 0.0, 0.0])).round(decimals=4)
        tensor(2.)
    """
    shares = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()
