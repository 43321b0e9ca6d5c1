"""Affine (uniform) quantization as pure functions of tensors: the one place that rounds.

A real number ``x`` is stored as the integer ``q = clamp(round(x / scale) + zero_point, qmin, qmax)`` and read back as
``(q - zero_point) * scale``. Halves are rounded to the even neighbour, and zero points are whole numbers from ``qmin``
to ``qmax``: what ONNX QuantizeLinear and DequantizeLinear compute. All functions take ``scale`` and ``zero_point`` with
one element (per tensor), with one element for each index of ``axis`` (per channel), or, without ``axis``, in any shape
that broadcasts to the tensor. With a ``ratio`` (equalized channels), ``x / (scale * ratio)`` is rounded instead, and
what is read back stands for ``x / ratio``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .spec import TensorSpec

# Elements that are encoded or decoded at once.
_PART = 1 << 20

# Smaller scales would overflow when divided by; a range this narrow holds nothing but zeros.
SMALLEST_SCALE = 1e-30


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return ``(qmin, qmax)``: ``[-2^(b-1), 2^(b-1) - 1]`` when symmetric, else ``[0, 2^b - 1]``.

    Example:
        >>> integer_range(4, symmetric=True), integer_range(4, symmetric=False)
        ((-8, 7), (0, 15))
    """
    spec = TensorSpec(bits, symmetric)
    return spec.qmin, spec.qmax


def choose_qparams(minimum: Tensor, maximum: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Choose the scale and zero point that map the real range ``[minimum, maximum]`` onto the integers of a spec.

    The range is widened to contain zero, so that zero (padding, pruned weights) is always exact. A range that is only
    zero gets the scale 1. The range of a nonnegative tensor begins at zero.

    Args:
        minimum: Smallest real values, any shape.
        maximum: Greatest real values, same shape.
        spec: Bit-width, symmetry, whether a range without negative values may have its zero point at ``qmin``, and
            whether the tensor is never negative.

    Returns:
        ``(scale, zero_point)``, float32 tensors of the shape of ``minimum``; zero points are whole numbers in
        ``[qmin, qmax]``.

    Example:
        >>> choose_qparams(torch.tensor(-1.0), torch.tensor(3.0), TensorSpec(bits=2))
        (tensor(1.3333), tensor(1.))
    """
    low = torch.zeros_like(minimum, dtype=torch.float32) if spec.nonnegative else minimum.float().clamp(max=0)
    high = maximum.float().clamp(min=0)
    if spec.symmetric:
        shifted = (low == 0) & spec.one_sided
        reach = torch.maximum(-low, high)
        scale = torch.where(shifted, reach, 2 * reach) / (spec.qmax - spec.qmin)
        zero_point = torch.where(shifted, float(spec.qmin), 0.0)
    else:
        scale = (high - low) / (spec.qmax - spec.qmin)
        scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
        zero_point = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
    return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale), zero_point


def along(parameter: Tensor, ndim: int, axis: int | None) -> Tensor:
    """View a per-channel parameter so that it broadcasts along ``axis`` of a tensor with ``ndim`` dimensions.

    Example:
        >>> along(torch.ones(3), ndim=4, axis=1).shape
        torch.Size([1, 3, 1, 1])
    """
    return parameter if axis is None else parameter.view([-1 if dim == axis else 1 for dim in range(ndim)])


def encode(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float,
    qmax: float,
    axis: int | None = None,
    rounding: Callable[[Tensor], Tensor] = torch.round,
    ratio: Tensor | None = None,
) -> Tensor:
    """Encode real numbers as integers; values outside the range saturate.

    Args:
        x: Floating-point tensor.
        scale: Positive, one element or one for each index of ``axis``.
        zero_point: Same shape as ``scale``; rounded and clamped to ``[qmin, qmax]`` before use.
        qmin: Smallest integer; minus infinity for no limit.
        qmax: Greatest integer; infinity for no limit.
        axis: Channel dimension of ``x``, or None for one scale for the whole tensor.
        rounding: How ``x / scale`` becomes a whole number: to the nearest, with ties to even, or ``torch.floor``.
        ratio: Positive, in a shape that broadcasts to ``x``; None for 1.

    Returns:
        float32 tensor of whole numbers, of the shape of ``x``.

    Example:
        >>> encode(torch.tensor([-1.0, 0.25, 9.0]), torch.tensor([0.5]), torch.tensor([1.0]), 0, 3)
        tensor([0., 1., 3.])
    """
    point = along(_whole(zero_point, qmin, qmax), x.dim(), axis)
    step = along(scale.float(), x.dim(), axis)
    return _encode(x.float(), step if ratio is None else step * ratio, point, rounding).clamp_(qmin, qmax)


def decode(q: Tensor, scale: Tensor, zero_point: Tensor, qmin: float, qmax: float, axis: int | None = None) -> Tensor:
    """Decode integers as the real numbers (float32) that they stand for; differentiable in ``q`` and ``scale``.

    Args:
        q: Whole numbers of any type.
        scale: See ``encode``.
        zero_point: See ``encode``.
        qmin: See ``encode``.
        qmax: See ``encode``.
        axis: See ``encode``.

    Example:
        >>> decode(torch.tensor([0, 1, 3]), torch.tensor([0.5]), torch.tensor([1.0]), 0, 3)
        tensor([-0.5000,  0.0000,  1.0000])
    """
    point = along(_whole(zero_point, qmin, qmax), q.dim(), axis)
    return (q.float() - point) * along(scale.float(), q.dim(), axis)


def in_parts(
    rows: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> Iterator[tuple[Any, tuple[Tensor, Tensor]]]:
    """Slices of the first dimension, each with its scales and zero points: a large tensor that goes through in parts
    needs little memory besides the result.

    Args:
        rows: The tensor.
        scale: One element or one for each index of ``axis``.
        zero_point: Same shape as ``scale``.
        axis: Channel dimension, or None.

    Example:
        >>> [part for part, _ in in_parts(torch.ones(4, 2), torch.ones(4), torch.ones(4), axis=0)]
        [Ellipsis]
    """
    if rows.numel() <= _PART:
        yield ..., (scale, zero_point)
        return
    step = max(1, _PART // rows[0].numel())
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        yield part, ((scale[part], zero_point[part]) if axis == 0 else (scale, zero_point))


def _whole(zero_point: Tensor, qmin: float, qmax: float) -> Tensor:
    """The zero point that acts: a whole number within the range of the integers."""
    return zero_point.detach().float().round().clamp(qmin, qmax)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """Encode and decode, differentiable by the straight-through estimator.

    Gradients follow LSQ+ (Bhalgat et al. 2020; LSQ: Esser et al. 2020, eq. 3): that of ``x`` passes where
    ``x`` is inside the range and is zero where it saturates; ``scale`` gets the rounding error inside and the saturated
    integer outside; ``zero_point`` is used rounded and gets ``-scale`` where ``x`` saturates. With a ``ratio`` the same
    holds of ``x / ratio``, whose derivatives ``x`` and ``ratio`` get.

    Args:
        x: Floating-point tensor; computed in float32 and returned in its own type.
        scale: Positive, one element or one for each index of ``axis``.
        zero_point: Same shape as ``scale``; rounded and clamped to ``[qmin, qmax]`` before use.
        qmin: Smallest integer.
        qmax: Greatest integer.
        axis: Channel dimension of ``x``, or None for one scale for the whole tensor.
        ratio: Positive, float32, in a shape of as many dimensions as ``x`` that broadcasts to it; None for 1.

    Returns:
        Tensor of the shape and type of ``x`` with at most ``qmax - qmin + 1`` distinct values a channel.

    Example:
        >>> fake_quantize(torch.tensor([-1.0, 0.4, 9.0]), torch.tensor([0.5]), torch.tensor([1.0]), 0, 3)
        tensor([-0.5000,  0.5000,  1.0000])
    """
    output: Tensor = _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, axis, ratio)
    return output


def _encode(
    x: Tensor, step: Tensor, point: Tensor, rounding: Callable[[Tensor], Tensor] = torch.Tensor.round_
) -> Tensor:
    """Integers before they are clamped, in fresh memory."""
    return rounding(x / step).add_(point)


def _decode_(integers: Tensor, step: Tensor, point: Tensor) -> Tensor:
    """Real numbers in the place of their integers."""
    return integers.sub_(point).mul_(step)


class _FakeQuantize(torch.autograd.Function):
    """In-place float arithmetic throughout: on a CPU several times as fast as torch's fused kernels and as masks of
    bool."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        axis: int | None,
        ratio: Tensor | None,
    ) -> Tensor:
        real = x.float()
        step = along(scale.float(), x.dim(), axis)
        point = along(_whole(zero_point, qmin, qmax), x.dim(), axis)
        integers = _encode(real, step if ratio is None else step * ratio, point)
        differentiable = any(ctx.needs_input_grad)
        clamped = integers.clamp(qmin, qmax) if differentiable else integers.clamp_(qmin, qmax)
        output = _decode_(clamped, step, point)
        ctx.axis, ctx.ends = axis, (qmin, qmax)
        if differentiable:
            of_parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2] or ctx.needs_input_grad[6]
            ctx.save_for_backward(integers, ratio, *((real, output, scale) if of_parameters else ()))
        return output.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        integers, ratio, *saved = ctx.saved_tensors
        wide = grad.float()
        # Zero where the integer was clamped. The bounds are exclusive.
        passed = torch.ops.aten.hardtanh_backward(wide, integers, ctx.ends[0] - 0.5, ctx.ends[1] + 0.5)
        grad_scale = grad_zero_point = grad_ratio = None
        if saved:
            real, output, scale = saved
            if ratio is not None:
                real = real / ratio
            # Inside, d(output)/d(scale) is (output - x) / scale; outside it is output / scale.
            if ctx.needs_input_grad[1]:
                grad_scale = (_dot(wide, output, ctx.axis) - _dot(passed, real, ctx.axis)).view_as(scale) / scale
            if ctx.needs_input_grad[2]:
                grad_zero_point = (_total(passed, ctx.axis) - _total(wide, ctx.axis)).view_as(scale) * scale
            if ctx.needs_input_grad[6]:
                grad_ratio = (passed * real).sum_to_size(ratio.shape).neg_().div_(ratio)
        if ratio is not None:
            passed = passed / ratio
        return (
            (passed.to(grad.dtype) if ctx.needs_input_grad[0] else None),
            grad_scale,
            grad_zero_point,
            None,
            None,
            None,
            grad_ratio,
        )


def _dot(a: Tensor, b: Tensor, axis: int | None) -> Tensor:
    """Inner product over all dimensions but ``axis``."""
    return dot(a, b) if axis is None else _total(a * b, axis)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product over all dimensions of two tensors of the same shape, without a copy if both have the
    same memory format.

    Example:
        >>> dot(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(11.)
    """
    if a.dim() == 4 and not a.is_contiguous() and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _total(a: Tensor, axis: int | None) -> Tensor:
    """Sum over all dimensions but ``axis``."""
    if axis is None or a.dim() == 1:
        return a.sum() if axis is None else a
    return a.sum(dim=[dim for dim in range(a.dim()) if dim != axis])
