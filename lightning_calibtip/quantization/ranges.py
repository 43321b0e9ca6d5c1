"""Search for the clipping range that loses least, of a tensor or a histogram: min-max, percentile, L_p-optimal."""

from collections.abc import Callable

import torch
from torch import Tensor

from .affine import choose_qparams, integer_range

RANGE_METHODS = ("minmax", "moving_average", "percentile", "mse", "lp")

# Fractions of the full range that the search tries, coarse over everything and then fine around the best.
_COARSE = torch.linspace(1.0, 0.1, 46)
_FINE = torch.linspace(0.02, -0.02, 9)

# Weights that are searched at once.
_CACHED = 2**17


def check_range_method(method: str, what: str) -> str:
    """Return ``method`` if it is one of ``RANGE_METHODS``, else raise ``ValueError`` naming ``what``."""
    if method not in RANGE_METHODS:
        raise ValueError(f"{what} must be one of {', '.join(RANGE_METHODS)}, got {method!r}.")
    return method


def weight_range(
    weight: Tensor,
    bits: int,
    symmetric: bool,
    axis: int | None,
    method: str = "mse",
    percentile: float = 99.99,
    p: float = 2.4,
) -> tuple[Tensor, Tensor]:
    """Range of a weight that is known whole.

    Args:
        weight: Any shape.
        bits: Width the range is for (only ``"mse"`` and ``"lp"`` depend on it).
        symmetric: Whether the integers are signed and the zero point 0.
        axis: Output-channel dimension for one range a channel, or None.
        method: One of ``RANGE_METHODS``; of a weight, which does not change, the moving average is the min-max range.
        percentile: For ``"percentile"``: share of the values, in per cent, that stays inside on each side.
        p: For ``"lp"``: exponent of the error.

    Returns:
        ``(minimum, maximum)``, each with one element a channel (``(1,)`` without ``axis``).
    """
    rows = weight.detach().float()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).flatten(1)
    low, high = rows.amin(1), rows.amax(1)
    if method == "percentile":
        upper = percentile / 100
        return _quantile(rows, 1 - upper), _quantile(rows, upper)
    if method in ("mse", "lp"):
        # A few channels at a time, which stay in the cache while all fractions are tried: an embedding has millions.
        channels = max(1, _CACHED // rows.shape[1])
        parts = zip(rows.split(channels), low.split(channels), high.split(channels), strict=True)
        exponent = 2.0 if method == "mse" else p
        ends = [lp_optimal_range(part, None, least, most, bits, symmetric, exponent) for part, least, most in parts]
        return torch.cat([end[0] for end in ends]), torch.cat([end[1] for end in ends])
    return low, high


def _quantile(rows: Tensor, fraction: float) -> Tensor:
    """Per-row quantile by sorting: ``torch.quantile`` refuses rows of more than 2^24 values."""
    index = round(fraction * (rows.shape[1] - 1))
    return rows.sort(dim=1).values[:, index]


def lp_optimal_range(
    values: Tensor,
    counts: Tensor | None,
    low: Tensor,
    high: Tensor,
    bits: int,
    symmetric: bool,
    p: float,
    one_sided: bool = False,
) -> tuple[Tensor, Tensor]:
    """Range inside ``[low, high]`` whose quantization has the least error ``sum |x - Q(x)|^p``.

    With ``p = 2`` the mean squared error; other exponents are the initialisation of LAPQ (Nahshan et al. 2021). Both
    ends are first drawn in together, then each alone.

    Args:
        values: Shape (channels, n).
        counts: Weight of each of the n values (a histogram's bin counts), or None for 1 each.
        low: Smallest value of each channel, shape (channels,).
        high: Greatest value of each channel, shape (channels,).
        bits: 2 to 16.
        symmetric: See ``choose_qparams``.
        p: Exponent, above 0.
        one_sided: See ``choose_qparams``.

    Returns:
        ``(minimum, maximum)``, each of shape (channels,).
    """
    qmin, qmax = integer_range(bits, symmetric)

    def error(minimum: Tensor, maximum: Tensor) -> Tensor:
        scale, zero_point = (q.unsqueeze(1) for q in choose_qparams(minimum, maximum, bits, symmetric, one_sided))
        integers = (torch.round(values / scale) + zero_point).clamp_(qmin, qmax)
        lost = integers.sub_(zero_point).mul_(scale).sub_(values).abs_().pow_(p)
        return (lost if counts is None else lost.mul_(counts)).sum(1)

    low, high = low.clamp(max=0), high.clamp(min=0)
    ones = torch.ones_like(low)
    ends: list[tuple[bool, bool]] = [(True, True)]
    if not symmetric:
        ends += [(False, True), (True, False)]
    shrink_low, shrink_high = ones, ones
    for move_low, move_high in ends:
        shrink_low, shrink_high = _draw_in(
            lambda a, b: error(low * a, high * b), shrink_low, shrink_high, move_low, move_high
        )
    return low * shrink_low, high * shrink_high


def _draw_in(
    error: Callable[[Tensor, Tensor], Tensor], low: Tensor, high: Tensor, move_low: bool, move_high: bool
) -> tuple[Tensor, Tensor]:
    """Line search, coarse then fine, over the fractions of the ends that move; the start is kept unless beaten."""
    best_low, best_high, best = low, high, error(low, high)
    for steps in (_COARSE, _FINE):
        centre_low, centre_high = best_low, best_high
        for step in steps.tolist():
            if steps is _COARSE:
                moved = torch.full_like(low, step)
                try_low, try_high = (moved if move_low else low), (moved if move_high else high)
            else:
                try_low = (centre_low + step).clamp(0.02, 1) if move_low else low
                try_high = (centre_high + step).clamp(0.02, 1) if move_high else high
            now = error(try_low, try_high)
            better = now < best
            best_low = torch.where(better, try_low, best_low)
            best_high = torch.where(better, try_high, best_high)
            best = torch.where(better, now, best)
    return best_low, best_high
