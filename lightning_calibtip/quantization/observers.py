"""Observers: what is remembered of the activations that pass a quantizer while calibrating.

Each is a ``torchmetrics.Metric``. Nothing is reduced over processes: where several work together, each sees all of the
batches.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .ranges import OBSERVER_NAMES, RangeOptions, lp_optimal_range
from .spec import TensorSpec

Range = tuple[Tensor, Tensor]
MakeObserver = Callable[[RangeOptions], "Observer"]

# Values that are counted at once on a CPU.
_PIECE = 2**16

_OBSERVERS: dict[str, MakeObserver] = {}


def register_observer(name: str) -> Callable[[MakeObserver], MakeObserver]:
    """Register an observer, as the ``observer`` of that name.

    Args:
        name: Name for ``RangeOptions.observer``.

    Returns:
        Decorator for a function that makes a new observer from ``RangeOptions``.

    Example:
        >>> @register_observer("half_range")
        ... def half_range(options):
        ...     class HalfRange(MinMaxObserver):
        ...         def _range(self, spec):
        ...             return self.minimum / 2, self.maximum / 2
        ...     return HalfRange()
        >>> make_observer(RangeOptions("half_range")).seen
        False
    """

    def register(make: MakeObserver) -> MakeObserver:
        if name not in OBSERVER_NAMES:
            OBSERVER_NAMES.append(name)
        _OBSERVERS[name] = make
        return make

    return register


def make_observer(options: RangeOptions) -> "Observer":
    """Make the observer that the options name.

    Example:
        >>> type(make_observer(RangeOptions("minmax"))).__name__
        'MinMaxObserver'
    """
    return _OBSERVERS[options.observer](options)


class Observer(Metric):
    """Remembers what calibration needs of the activations that pass, and gives a range for any format at the end.

    Example:
        See ``MinMaxObserver``.
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"sync_on_compute": False, **kwargs})

    @property
    def seen(self) -> bool:
        """Whether anything was observed."""
        return bool(self.update_count > 0)

    def compute_range(self, spec: TensorSpec) -> Range:
        """Compute the range for a format, each end of shape (1,).

        Raises:
            RuntimeError: If nothing was observed yet.
        """
        if not self.seen:
            raise RuntimeError("This observer has seen no data: run at least one calibration batch through the model.")
        return self._range(spec)

    def compute(self) -> Range:
        """Compute the range for 8 bits (``compute_range`` gives it for any format)."""
        return self._range(TensorSpec(8))

    @abstractmethod
    def _range(self, spec: TensorSpec) -> Range:
        """The range that the state gives."""


class MinMaxObserver(Observer):
    """Smallest and greatest value of all batches.

    Example:
        >>> observer = MinMaxObserver()
        >>> observer.update(torch.tensor([-1.0, 2.0]))
        >>> observer.update(torch.tensor([0.0, 5.0]))
        >>> observer.compute_range(TensorSpec(8))
        (tensor([-1.]), tensor([5.]))
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("minimum", torch.full((1,), torch.inf))
        self.add_state("maximum", torch.full((1,), -torch.inf))

    def update(self, x: Tensor) -> None:
        """Widen the range to that of ``x`` (any shape)."""
        low, high = torch.aminmax(x.detach().float())
        self.minimum = torch.minimum(self.minimum, low)
        self.maximum = torch.maximum(self.maximum, high)

    def _range(self, spec: TensorSpec) -> Range:
        return self.minimum, self.maximum


class MovingAverageObserver(Observer):
    """Exponential moving average of each batch's smallest and greatest value, the range of the paper's code.

    Args:
        momentum: Weight of the newest batch, above 0 and at most 1.

    Example:
        >>> observer = MovingAverageObserver(momentum=0.5)
        >>> observer.update(torch.tensor([-1.0, 2.0]))
        >>> observer.update(torch.tensor([0.0, 4.0]))
        >>> observer.compute_range(TensorSpec(8))
        (tensor([-0.5000]), tensor([3.]))
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(self, momentum: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {momentum}.")
        self.momentum = momentum
        self.add_state("minimum", torch.zeros(1))
        self.add_state("maximum", torch.zeros(1))

    def update(self, x: Tensor) -> None:
        """Move the range towards that of ``x`` (any shape); the first batch sets it."""
        low, high = torch.aminmax(x.detach().float())
        weight = self.momentum if self.update_count > 1 else 1.0
        self.minimum = torch.lerp(self.minimum, low, weight)
        self.maximum = torch.lerp(self.maximum, high, weight)

    def _range(self, spec: TensorSpec) -> Range:
        return self.minimum, self.maximum


def widen(histogram: Tensor, reach: float, wanted: float) -> Tensor:
    """Return the same counts over ``[-wanted, wanted]``; both reaches are powers of two, so bins merge in pairs and
    nothing blurs.

    Args:
        histogram: Counts over ``[-reach, reach]``; the number of bins is a multiple of 4.
        reach: Present reach.
        wanted: Reach of the result.

    Example:
        >>> widen(torch.tensor([1.0, 2.0, 3.0, 4.0]), reach=1.0, wanted=2.0)
        tensor([0., 3., 7., 0.])
    """
    while 0 < reach < wanted:
        quarter = histogram.numel() // 4
        merged = histogram.view(-1, 2).sum(1)
        histogram = torch.nn.functional.pad(merged, (quarter, quarter))
        reach *= 2
    return histogram


def _counts(values: Tensor, bins: int, reach: float) -> Tensor:
    """Number of values in each of so many bins from ``-reach`` to ``reach``, float32, shape (bins,).

    On a CPU counting integers, in pieces that stay in its cache, takes a sixth of the time of ``torch.histc``.
    """
    if values.device.type != "cpu":
        return torch.histc(values, bins=bins, min=-reach, max=reach)
    counts = torch.zeros(bins, dtype=torch.int64, device="cpu")
    for piece in values.flatten().split(_PIECE):
        # Exact where there are 2^n bins, since reach is a power of two: a value lies in the bin of its real number.
        places = (piece / reach).mul_(bins / 2).floor_().to(torch.int32).add_(bins // 2)
        counts += torch.bincount(places.clamp_(0, bins - 1), minlength=bins)
    return counts.float()


class HistogramObserver(Observer):
    """Histogram of all values seen, over a range that doubles as greater values come; from it the range is chosen at
    the end.

    The state is one row: the reach (a power of two; bins span ``[-reach, reach]``), the smallest and the greatest
    value, and the bins' counts.

    Args:
        method: ``"percentile"``, ``"mse"`` or ``"lp"``.
        percentile: Share of the values, in per cent, that stays inside on each side, above 50 and at most 100.
        p: Exponent of the error for ``"lp"``, above 0.
        bins: Number of bins, a multiple of 4.

    Example:
        >>> observer = HistogramObserver("percentile", percentile=90.0, bins=8)
        >>> observer.update(torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0]))
        >>> float(observer.row[3:].sum())
        5.0
    """

    row: Tensor

    def __init__(
        self, method: str = "mse", percentile: float = 99.99, p: float = 2.4, bins: int = 8192, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100 (per cent), got {percentile}.")
        if p <= 0:
            raise ValueError(f"p must be above 0, got {p}.")
        self.method, self.percentile, self.p, self.bins = method, percentile, p, bins
        start = torch.zeros(3 + bins)
        start[1], start[2] = torch.inf, -torch.inf
        self.add_state("row", start)

    def update(self, x: Tensor) -> None:
        """Count the values of ``x`` (any shape)."""
        values = x.detach().float()
        low, high = (float(end) for end in torch.aminmax(values))
        reach, wanted = float(self.row[0]), max(-low, high)
        if wanted > reach:
            wanted = 2.0 ** torch.tensor(wanted, dtype=torch.float64).log2().ceil().item()
            self.row[3:] = widen(self.row[3:], reach, wanted)
            reach = wanted
        self.row[0] = reach
        self.row[1] = min(float(self.row[1]), low)
        self.row[2] = max(float(self.row[2]), high)
        if reach:
            self.row[3:] += _counts(values, self.bins, reach)
        else:
            self.row[3 + self.bins // 2] += values.numel()

    def _range(self, spec: TensorSpec) -> Range:
        reach, low, high = self.row[:3].split(1)
        counts = self.row[3:]
        width = 2 * reach / self.bins
        centres = (torch.arange(self.bins, device=counts.device) + 0.5) * width - reach
        if self.method == "percentile":
            below = counts.cumsum(0) / counts.sum()
            outside = 1 - self.percentile / 100
            low_bin = int((below <= outside).sum())
            high_bin = min(int((below < 1 - outside).sum()), self.bins - 1)
            return torch.maximum(centres[low_bin] - width / 2, low), torch.minimum(centres[high_bin] + width / 2, high)
        used = counts > 0
        values, weights = centres[used].clamp(low, high).unsqueeze(0), counts[used]
        p = 2.0 if self.method == "mse" else self.p
        return lp_optimal_range(values, weights, low, high, spec, p)


class BitPercentileObserver(HistogramObserver):
    """Cuts off the more values, the fewer the bits: on each side 0.1 per cent at 8 bits and more, 1 per cent at 4 and
    fewer, in between so that four bits less are ten times as much (Degree-Quant: Tailor et al. 2021, section 4.2).

    Example:
        >>> observer = BitPercentileObserver()
        >>> observer.update(torch.linspace(0, 1, 1000))
        >>> [round(observer.compute_range(TensorSpec(bits))[1].item(), 2) for bits in (8, 4)]
        [1.0, 0.99]
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("percentile", **kwargs)

    def _range(self, spec: TensorSpec) -> Range:
        self.percentile = 100 - 10 ** -((min(max(spec.bits, 4), 8) - 4) / 4)
        return super()._range(spec)


@register_observer("minmax")
def _min_max(options: RangeOptions) -> Observer:
    return MinMaxObserver()


@register_observer("moving_average")
def _moving_average(options: RangeOptions) -> Observer:
    return MovingAverageObserver(options.momentum)


@register_observer("percentile")
@register_observer("mse")
@register_observer("lp")
def _histogram(options: RangeOptions) -> Observer:
    return HistogramObserver(options.observer, options.percentile, options.p)


@register_observer("percentile_by_bits")
def _bit_percentile(options: RangeOptions) -> Observer:
    return BitPercentileObserver()
