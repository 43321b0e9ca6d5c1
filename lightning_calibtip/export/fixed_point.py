"""Integer arithmetic as processors without floating point do it: a multiplier below 1 and a shift.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.2.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIER_BITS = 31


class Multiplier(NamedTuple):
    """Real factors as ``multiplier * 2 ** -(31 + shift)``.

    Args:
        multiplier: int64, each in ``[2**30, 2**31)``, which stands for a number in ``[0.5, 1)``.
        shift: int64, places to the right after the product's upper half was taken; negative to the left.

    Example:
        See ``fixed_point``.
    """

    multiplier: Tensor
    shift: Tensor


def fixed_point(factor: Tensor) -> Multiplier:
    """Write positive factors as integers and shifts (equation 6).

    Args:
        factor: float64, any shape.

    Returns:
        Integers of the same shape.

    Raises:
        ValueError: If a factor is not positive and finite.

    Example:
        >>> fixed_point(torch.tensor([0.25], dtype=torch.float64))
        Multiplier(multiplier=tensor([1073741824]), shift=tensor([1]))
    """
    if not bool(torch.isfinite(factor).all() and (factor > 0).all()):
        raise ValueError(f"Factors of a rescaling must be positive and finite, got {factor.min():g} as the least.")
    mantissa, exponent = torch.frexp(factor.double())
    multiplier = torch.round(mantissa * 2**_MULTIPLIER_BITS).to(torch.int64)
    full = multiplier == 2**_MULTIPLIER_BITS
    multiplier = torch.where(full, multiplier // 2, multiplier)
    return Multiplier(multiplier, -(exponent.to(torch.int64) + full.to(torch.int64)))


def rescale(values: Tensor, by: Multiplier) -> Tensor:
    """Multiply int32 values by fixed-point factors and round to the nearest integer, halves upwards.

    Args:
        values: Integers within int32, int64.
        by: Factors that broadcast to the values.

    Returns:
        int64, the shape of ``values``.

    Example:
        >>> rescale(torch.tensor([10, 11, -3]), fixed_point(torch.tensor(0.5, dtype=torch.float64)))
        tensor([ 5,  6, -1])
    """
    shift = _MULTIPLIER_BITS + by.shift
    # Beyond 62 places nothing is left of a product.
    right = shift.clamp(1, 62)
    product = values * by.multiplier
    rounded = (product + (torch.ones_like(right) << (right - 1))) >> right
    left = values * (by.multiplier >> 1) << (1 - shift).clamp(min=0) if bool((shift < 1).any()) else rounded
    return torch.where(shift > 62, torch.zeros_like(rounded), torch.where(shift < 1, left, rounded))


def require_int32(values: Tensor, where: str) -> Tensor:
    """Return accumulated values if they fit int32.

    Raises:
        OverflowError: If they do not; the message names the place.

    Example:
        >>> require_int32(torch.tensor([5]), "conv1")
        tensor([5])
    """
    largest = int(values.abs().max()) if values.numel() else 0
    if largest >= 2**31:
        raise OverflowError(
            f"{where}: a sum of products, {largest:,}, does not fit 32 bits (2^{math.log2(largest):.1f})."
        )
    return values
