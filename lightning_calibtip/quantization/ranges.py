"""Clipping ranges of tensors that are known whole, and the search for the range that loses least."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .affine import choose_qparams, fake_quantize
from .protection import Protection
from .spec import PerChannel, PerGroup, TensorSpec

RangeMethod = Callable[[Tensor, TensorSpec, "RangeOptions"], tuple[Tensor, Tensor]]

SEARCHES = ("each", "joint")

# Observers that keep histograms.
HISTOGRAMS = ("mse", "lp", "percentile")

# The search tries these fractions of the full range, then steps of these lengths around the best: of both ends
# together, and at last of one end alone.
_COARSE = [1 - 0.06 * step for step in range(1, 16)]
_FINE = (0.03, 0.015, 0.007)
_ALONE = (0.24, 0.12, 0.06)

# Number of weights that are searched at once.
_CACHED = 2**17

_RANGE_METHODS: dict[str, RangeMethod] = {}

# Names that ``register_observer`` has added. They are kept here, where options are checked, because observers are made
# from these options and so import this module.
OBSERVER_NAMES: list[str] = []


def register_range_method(name: str) -> Callable[[RangeMethod], RangeMethod]:
    """Register a function that chooses the ranges of weights, as the ``weight_observer`` of that name.

    Args:
        name: Name for ``RangeOptions.weight_observer``.

    Returns:
        Decorator for a function ``(rows, spec, options) -> (minimum, maximum)``: rows of shape (channels, n), each of
        which has one range; the ends have shape (channels,).

    Example:
        >>> @register_range_method("three_sigma")
        ... def three_sigma(rows, spec, options):
        ...     return rows.mean(1) - 3 * rows.std(1), rows.mean(1) + 3 * rows.std(1)
        >>> RangeOptions(weight_observer="three_sigma").weight_observer
        'three_sigma'
    """

    def register(method: RangeMethod) -> RangeMethod:
        _RANGE_METHODS[name] = method
        return method

    return register


@dataclass(frozen=True)
class RangeOptions:
    """How the ranges of activations and weights are chosen: the options of ``Calibration``.

    Args:
        observer: How ranges of activations are chosen: ``"minmax"``, ``"moving_average"`` (of each batch's minimum and
            maximum, as in the paper), ``"percentile"``, ``"percentile_by_bits"`` (cuts off 0.1 per cent on each side at
            8 bits and 1 at 4), ``"mse"`` (least mean squared error), ``"lp"`` (least L_p error, the initialisation of
            LAPQ), or the name of a registered one.
        weight_observer: The same for weights.
        momentum: For ``"moving_average"``: weight of the newest batch, above 0 and at most 1.
        percentile: For ``"percentile"``: share of the values, in per cent, that stays inside the range on each side,
            above 50 and at most 100.
        p: For ``"lp"``: exponent of the error, above 0.
        search: ``"each"``: every range by itself, as the observers say. ``"joint"``: from ranges of least L_p error,
            for the p at which the model comes closest to the float logits, all steps are moved together by Powell's
            method (LAPQ, Nahshan et al. 2021), without gradients.
        joint_samples: For ``"joint"``: number of calibration samples, at least 1, that the model is measured on; the
            first ones, in whole batches.
        joint_iterations: For ``"joint"``: number of Powell's iterations, at least 1, each of which moves every step.
        joint_evaluations: For ``"joint"``: how often the model is measured at most, at least 2.
        protection_low: Probability that a node of the lowest in-degree of its graph is protected: what it sends, and
            what is aggregated for it, is not observed.
        protection_high: The same of a node of the highest in-degree, at least ``protection_low`` and at most 1; between
            them it grows with the rank (Degree-Quant: Tailor et al. 2021, who take 0.1 or 0.2). 0 protects none.
        seed: Random seed of the protection.

    Raises:
        ValueError: If a name is not registered, or a value is out of its range.

    Example:
        >>> RangeOptions("percentile", percentile=99.9).percentile
        99.9
    """

    observer: str = "mse"
    weight_observer: str = "mse"
    momentum: float = 0.1
    percentile: float = 99.99
    p: float = 2.4
    search: Literal["each", "joint"] = "each"
    joint_samples: int = 512
    joint_iterations: int = 1
    joint_evaluations: int = 1000
    protection_low: float = 0.0
    protection_high: float = 0.0
    seed: int = 0

    @property
    def protection(self) -> Protection:
        """Probabilities of nodes to be protected."""
        return Protection(self.protection_low, self.protection_high)

    def __post_init__(self) -> None:
        for what, name, names in (
            ("observer", self.observer, OBSERVER_NAMES),
            ("weight_observer", self.weight_observer, list(_RANGE_METHODS)),
        ):
            if name not in names:
                raise ValueError(f"{what} must be one of {', '.join(names)}, got {name!r}.")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {self.momentum}.")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100 (per cent), got {self.percentile}.")
        if not self.p > 0:
            raise ValueError(f"p must be above 0, got {self.p}.")
        if self.search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {self.search!r}.")
        counts = (("joint_samples", 1), ("joint_iterations", 1), ("joint_evaluations", 2), ("seed", 0))
        for what, least in counts:
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{what} must be an integer of at least {least}, got {value!r}.")
        _ = self.protection
        if self.search == "joint" and self.observer not in HISTOGRAMS:
            raise ValueError(
                f"search='joint' starts from histograms: observer must be one of {', '.join(HISTOGRAMS)}, got "
                f"{self.observer!r}."
            )


def weight_range(weight: Tensor, spec: TensorSpec, options: RangeOptions) -> tuple[Tensor, Tensor]:
    """Choose the ranges of a weight.

    Args:
        weight: Any shape.
        spec: Its format; only ``"mse"`` and ``"lp"`` depend on the bit-width.
        options: ``weight_observer`` says how; the weight does not change, so its moving average is the min-max range.

    Returns:
        ``(minimum, maximum)``, each with one element for each scale.

    Example:
        >>> weight_range(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), TensorSpec(granularity=PerChannel(0)),
        ...              RangeOptions(weight_observer="minmax"))
        (tensor([-2.,  0.]), tensor([1., 3.]))
    """
    rows = weight.detach().float()
    method = _RANGE_METHODS[options.weight_observer]
    if not isinstance(spec.granularity, PerChannel | PerGroup):
        return method(rows.reshape(1, -1), spec, options)
    rows = rows.movedim(spec.granularity.axis, 0).flatten(1)
    if isinstance(spec.granularity, PerChannel):
        return method(rows, spec, options)
    # Shorter groups apart from the others: zeros that fill them up would shift percentiles and averages.
    size = spec.granularity.size
    whole = rows.shape[1] // size * size
    parts = [rows[:, :whole].reshape(-1, size), rows[:, whole:]]
    ends = [method(part, spec, options) for part in parts if part.numel()]
    low, high = (torch.cat([end.view(len(rows), -1) for end in side], 1).view(-1) for side in zip(*ends, strict=True))
    return low, high


@register_range_method("minmax")
@register_range_method("moving_average")
def _min_max(rows: Tensor, spec: TensorSpec, options: RangeOptions) -> tuple[Tensor, Tensor]:
    return rows.amin(1), rows.amax(1)


@register_range_method("percentile")
def _percentile(rows: Tensor, spec: TensorSpec, options: RangeOptions) -> tuple[Tensor, Tensor]:
    upper = options.percentile / 100
    return _quantile(rows, 1 - upper), _quantile(rows, upper)


@register_range_method("mse")
def _least_squares(rows: Tensor, spec: TensorSpec, options: RangeOptions) -> tuple[Tensor, Tensor]:
    return _searched(rows, spec, 2.0)


@register_range_method("lp")
def _least_lp(rows: Tensor, spec: TensorSpec, options: RangeOptions) -> tuple[Tensor, Tensor]:
    return _searched(rows, spec, options.p)


def _searched(rows: Tensor, spec: TensorSpec, p: float) -> tuple[Tensor, Tensor]:
    # A few channels at a time, which stay in the cache while all fractions are tried: an embedding has millions.
    channels = max(1, _CACHED // rows.shape[1])
    ends = [lp_optimal_range(part, None, part.amin(1), part.amax(1), spec, p) for part in rows.split(channels)]
    return torch.cat([end[0] for end in ends]), torch.cat([end[1] for end in ends])


def _quantile(rows: Tensor, fraction: float) -> Tensor:
    """Per-row quantile by sorting: ``torch.quantile`` refuses rows of more than 2^24 values."""
    index = round(fraction * (rows.shape[1] - 1))
    return rows.sort(dim=1).values[:, index]


def lp_optimal_range(
    values: Tensor,
    counts: Tensor | None,
    low: Tensor,
    high: Tensor,
    spec: TensorSpec,
    p: float,
) -> tuple[Tensor, Tensor]:
    """Find the range inside ``[low, high]`` whose quantization has the least error ``sum |x - Q(x)|^p``.

    With ``p = 2`` the mean squared error; other exponents are the initialisation of LAPQ (Nahshan et al. 2021). Both
    ends are first drawn in together, then each alone.

    Args:
        values: Shape (channels, n), without gradients.
        counts: Weight of each of the n values (a histogram's bin counts), or None for 1 each.
        low: Smallest value of each channel, shape (channels,).
        high: Greatest value of each channel, shape (channels,).
        spec: Format that the range is for.
        p: Exponent, above 0.

    Returns:
        ``(minimum, maximum)``, each of shape (channels,).

    Example:
        >>> rows = torch.cat([torch.linspace(0, 1, 64), torch.tensor([10.0])]).view(1, -1)
        >>> low, high = lp_optimal_range(rows, None, rows.amin(1), rows.amax(1), TensorSpec(3), p=1.0)
        >>> bool(high < 10)
        True
    """
    low, high = low.clamp(max=0), high.clamp(min=0)

    def error(shrink_low: Tensor, shrink_high: Tensor) -> Tensor:
        minimum, maximum = low * shrink_low, high * shrink_high
        scale, zero_point = (q.unsqueeze(1) for q in choose_qparams(minimum, maximum, spec))
        lost = fake_quantize(values, scale, zero_point, spec.qmin, spec.qmax).sub_(values)
        lost = lost.square_() if p == 2 else lost.abs_().pow_(p)
        return (lost if counts is None else lost.mul_(counts)).sum(1)

    search = _ShrinkSearch(error, torch.ones_like(low))
    for fraction in _COARSE:
        search.attempt(torch.full_like(low, fraction), torch.full_like(low, fraction))
    for step in _FINE:
        search.both_ways(step, step)
    if not spec.symmetric:
        for step in (*_ALONE, *_FINE):
            search.both_ways(step, 0.0)
            search.both_ways(0.0, step)
    return low * search.low, high * search.high


class _ShrinkSearch:
    """The best fractions of both ends so far, row by row; the full range is kept unless beaten."""

    def __init__(self, error: Callable[[Tensor, Tensor], Tensor], ones: Tensor) -> None:
        self.error, self.low, self.high = error, ones, ones
        self.least = error(ones, ones)

    def attempt(self, low: Tensor, high: Tensor) -> None:
        """Take other fractions wherever they lose less."""
        error = self.error(low, high)
        better = error < self.least
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
        self.least = torch.where(better, error, self.least)

    def both_ways(self, low: float, high: float) -> None:
        """Try a step inward and a step outward from where the search stands."""
        stands = self.low, self.high
        for sign in (-1, 1):
            self.attempt((stands[0] + sign * low).clamp(0.02, 1), (stands[1] + sign * high).clamp(0.02, 1))
