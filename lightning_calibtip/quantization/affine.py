"""Affine (uniform) quantization as pure functions of tensors.

A real number ``x`` is stored as the integer ``q = clamp(round(x / scale) + zero_point, qmin, qmax)`` and read back as
``(q - zero_point) * scale``. All functions take ``scale`` and ``zero_point`` either with one element (per tensor) or
with one element for each index of ``axis`` (per channel).
"""

from typing import Any

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 16

# Smaller scales would overflow when inverted; a range this narrow holds nothing but zeros.
SMALLEST_SCALE = 1e-30


def check_bits(bits: int, what: str) -> int:
    """Return ``bits`` if it is an integer from 2 to 16.

    Raises:
        ValueError: naming ``what``, the value and the allowed range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{what} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}.")
    return bits


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return ``(qmin, qmax)``: ``[-2^(b-1), 2^(b-1) - 1]`` when symmetric, else ``[0, 2^b - 1]``.

    Example:
        >>> integer_range(4, symmetric=True), integer_range(4, symmetric=False)
        ((-8, 7), (0, 15))
    """
    if symmetric:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def choose_qparams(
    minimum: Tensor, maximum: Tensor, bits: int, symmetric: bool, one_sided: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map the real range ``[minimum, maximum]`` onto the integers of ``bits`` bits.

    The range is widened to contain zero, so that zero (padding, pruned weights) is always exact. A range that is only
    zero gets the scale 1.

    Args:
        minimum: Smallest real values, any shape.
        maximum: Greatest real values, same shape.
        bits: 2 to 16.
        symmetric: Whether the signed integer range is used with a zero point of 0.
        one_sided: Whether a symmetric range without negative values (after a ReLU) may put its zero point at ``qmin``
            instead of wasting half of the integers.

    Returns:
        ``(scale, zero_point)``, float32 tensors of the shape of ``minimum``; zero points are whole numbers in
        ``[qmin, qmax]``.

    Example:
        >>> choose_qparams(torch.tensor(-1.0), torch.tensor(3.0), bits=2, symmetric=False)
        (tensor(1.3333), tensor(1.))
    """
    qmin, qmax = integer_range(bits, symmetric)
    low = minimum.float().clamp(max=0)
    high = maximum.float().clamp(min=0)
    if symmetric:
        shifted = (low == 0) & one_sided
        reach = torch.maximum(-low, high)
        scale = torch.where(shifted, reach, 2 * reach) / (qmax - qmin)
        zero_point = torch.where(shifted, float(qmin), 0.0)
    else:
        scale = (high - low) / (qmax - qmin)
        scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
        zero_point = (qmin - torch.round(low / scale)).clamp(qmin, qmax)
    return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale), zero_point


def _along(parameter: Tensor, ndim: int, axis: int | None) -> Tensor:
    """View a per-channel parameter so that it broadcasts along ``axis`` of a tensor with ``ndim`` dimensions."""
    if axis is None:
        return parameter
    return parameter.view([-1 if dim == axis else 1 for dim in range(ndim)])


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None) -> Tensor:
    """Integers (int32) that stand for ``x``; values outside the range saturate, halves go to the even neighbour."""
    inverse = _along(scale.float().reciprocal(), x.dim(), axis)
    rounded = torch.round(x.float() * inverse) + _along(zero_point.round(), x.dim(), axis)
    return rounded.clamp(qmin, qmax).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """Real numbers (float32) that the integers ``q`` stand for."""
    shifted = q.float() - _along(zero_point.round(), q.dim(), axis)
    return shifted * _along(scale.float(), q.dim(), axis)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """``dequantize(quantize(x))``, differentiable by the straight-through estimator.

    Gradients follow LSQ+ (Bhalgat et al. 2020; LSQ: Esser et al. 2020, eq. 3): that of ``x`` passes where
    ``x`` is inside the range and is zero where it saturates; ``scale`` gets the rounding error inside and the saturated
    integer outside; ``zero_point`` is used rounded and gets ``-scale`` where ``x`` saturates.

    Args:
        x: Floating-point tensor; computed in float32 and returned in its own type.
        scale: Positive, one element or one for each index of ``axis``.
        zero_point: Same shape as ``scale``; rounded to whole numbers before use.
        qmin: Smallest integer.
        qmax: Greatest integer.
        axis: Channel dimension of ``x``, or None for one scale for the whole tensor.

    Returns:
        Tensor of the shape and type of ``x`` with at most ``qmax - qmin + 1`` distinct values a channel.

    Example:
        >>> fake_quantize(torch.tensor([-1.0, 0.4, 9.0]), torch.tensor([0.5]), torch.tensor([1.0]), 0, 3)
        tensor([-0.5000,  0.5000,  1.0000])
    """
    output: Tensor = _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, axis)
    return output


class _FakeQuantize(torch.autograd.Function):
    """In-place float arithmetic throughout: on a CPU several times as fast as torch's fused kernels and as masks of
    bool."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
    ) -> Tensor:
        real = x.float()
        step = _along(scale.float(), x.dim(), axis)
        point = _along(zero_point.round().clamp(qmin, qmax), x.dim(), axis)
        integers = (real * step.reciprocal()).round_().add_(point)
        differentiable = any(ctx.needs_input_grad)
        clamped = integers.clamp(qmin, qmax) if differentiable else integers.clamp_(qmin, qmax)
        output = clamped.sub_(point).mul_(step)
        ctx.axis, ctx.ends = axis, (qmin, qmax)
        if differentiable:
            ctx.save_for_backward(integers, *((real, output, scale) if any(ctx.needs_input_grad[1:3]) else ()))
        return output.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        integers, *saved = ctx.saved_tensors
        wide = grad.float()
        # Zero where the integer was clamped. The bounds are exclusive.
        passed = torch.ops.aten.hardtanh_backward(wide, integers, ctx.ends[0] - 0.5, ctx.ends[1] + 0.5)
        grad_scale = grad_zero_point = None
        if saved:
            real, output, scale = saved
            # Inside, d(output)/d(scale) is (output - x) / scale; outside it is output / scale.
            if ctx.needs_input_grad[1]:
                grad_scale = (_dot(wide, output, ctx.axis) - _dot(passed, real, ctx.axis)).view_as(scale) / scale
            if ctx.needs_input_grad[2]:
                grad_zero_point = (_total(passed, ctx.axis) - _total(wide, ctx.axis)).view_as(scale) * scale
        return (
            (passed.to(grad.dtype) if ctx.needs_input_grad[0] else None),
            grad_scale,
            grad_zero_point,
            None,
            None,
            None,
        )


def _dot(a: Tensor, b: Tensor, axis: int | None) -> Tensor:
    """Inner product over all dimensions but ``axis``."""
    return dot(a, b) if axis is None else _total(a * b, axis)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over all dimensions of two tensors of the same shape, of which none is copied if both lie in the
    same memory format."""
    if a.dim() == 4 and not a.is_contiguous() and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _total(a: Tensor, axis: int | None) -> Tensor:
    """Sum over all dimensions but ``axis``."""
    if axis is None or a.dim() == 1:
        return a.sum() if axis is None else a
    return a.sum(dim=[dim for dim in range(a.dim()) if dim != axis])
