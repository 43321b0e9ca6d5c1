"""Operators of exported convolutional networks, on integers alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from .fixed_point import fixed_point, require_int32, rescale
from .graph_values import attribute_of

# Operands of an addition are brought to a common scale with this many more bits.
_ADDITION_BITS = 20


@dataclass
class Integers:
    """A tensor as integers.

    Args:
        values: int64.
        scale: Real size of a step, float64; one, or one for each channel.
        zero_point: Integer that stands for zero.

    Example:
        >>> Integers(torch.tensor([3]), torch.tensor(0.5, dtype=torch.float64), 1).centred
        tensor([2])
    """

    values: Tensor
    scale: Tensor
    zero_point: int = 0

    @property
    def centred(self) -> Tensor:
        """Steps from zero."""
        return self.values - self.zero_point

    @property
    def real(self) -> Tensor:
        """The numbers that they stand for, float32."""
        return (self.centred * self.scale).float()


@dataclass
class Sum:
    """A sum of products or of other integers, before it is quantized.

    Args:
        values: int64 within int32.
        scale: Real size of 1, float64; one, or one that broadcasts to the values.
        where: Name of the node, for messages.

    Example:
        >>> Sum(torch.tensor([3]), torch.tensor(0.5, dtype=torch.float64), "conv1").real
        tensor([1.5000])
    """

    values: Tensor
    scale: Tensor
    where: str

    @property
    def real(self) -> Tensor:
        """The real numbers, float32: the end of a network."""
        return (self.values * self.scale).float()


def _quantize(node: ir.Node, inputs: list[Any]) -> Integers:
    x, scale, point = inputs
    limits = torch.iinfo(point.dtype)
    zero_point, scale = int(point), scale.double()
    if isinstance(x, Tensor):
        # Real numbers come in from outside.
        values = torch.round(x / scale.float()).to(torch.int64) + zero_point
    elif isinstance(x, Integers):
        same = torch.equal(x.scale, scale) and x.zero_point == zero_point
        values = x.values if same else rescale(x.centred, fixed_point(x.scale / scale)) + zero_point
    else:
        values = rescale(x.values, fixed_point(x.scale / scale)) + zero_point
    return Integers(values.clamp(limits.min, limits.max), scale, zero_point)


def _dequantize(node: ir.Node, inputs: list[Any]) -> Integers:
    x, scale, point = inputs
    if isinstance(x, Integers):
        return x
    # The integers of a weight or a bias: their zero points are 0 in formats that processors run.
    if bool(point.any()):
        raise NotImplementedError(f"{node.name}: the weight has zero points; export with target='onnxruntime'.")
    return Integers(x.to(torch.int64), scale.double())


def _accumulate(node: ir.Node, x: Integers, w: Integers, bias: Integers | None, products: Tensor, channels: int) -> Sum:
    sums = products.round().to(torch.int64)
    shape = [-1 if dim == channels % sums.dim() else 1 for dim in range(sums.dim())]
    if bias is not None:
        sums = sums + bias.values.view(shape)
    scale = x.scale * (w.scale.view(shape) if w.scale.dim() else w.scale)
    return Sum(require_int32(sums, node.name or ""), scale, node.name or "")


def _convolution(node: ir.Node, inputs: list[Any]) -> Sum:
    x, w, bias = (*inputs, None)[:3]
    dims = w.values.dim() - 2
    pads = attribute_of(node, "pads", [0] * 2 * dims)
    # Sums of integers are exact in float64.
    padding = [amount for i in reversed(range(dims)) for amount in (pads[i], pads[dims + i])]
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    products = convolve(
        F.pad(x.centred.double(), padding),
        w.values.double(),
        stride=tuple(attribute_of(node, "strides", [1] * dims)),
        dilation=tuple(attribute_of(node, "dilations", [1] * dims)),
        groups=attribute_of(node, "group", 1),
    )
    return _accumulate(node, x, w, bias, products, channels=1)


def _linear(node: ir.Node, inputs: list[Any]) -> Sum:
    x, w, bias = (*inputs, None)[:3]
    weight = w.values.double()
    weight = weight if attribute_of(node, "transB", 0) else weight.t()
    return _accumulate(node, x, w, bias, F.linear(x.centred.double(), weight), channels=-1)


def _add(node: ir.Node, inputs: list[Any]) -> Sum:
    first, second = inputs
    unit = 2 * torch.maximum(first.scale, second.scale) / 2**_ADDITION_BITS
    parts = [rescale(part.centred, fixed_point(part.scale / unit)) for part in (first, second)]
    return Sum(require_int32(parts[0] + parts[1], node.name or ""), unit, node.name or "")


def _average(node: ir.Node, inputs: list[Any]) -> Sum:
    (x,) = inputs
    size = list(attribute_of(node, "kernel_shape", x.values.shape[2:]))
    if attribute_of(node, "ceil_mode", 0) or len(size) != 2:
        raise NotImplementedError(f"{node.name}: only averages over images, in whole windows, are computed here.")
    strides = list(attribute_of(node, "strides", [1] * len(size)))
    pads = attribute_of(node, "pads", [0] * 2 * len(size))
    if any(pads) and not attribute_of(node, "count_include_pad", 0):
        raise NotImplementedError(f"{node.name}: averages that leave padding out are not computed in integers here.")
    padding = [amount for i in reversed(range(len(size))) for amount in (pads[i], pads[len(size) + i])]
    count = 1
    for length in size:
        count *= int(length)
    means = F.avg_pool2d(F.pad(x.centred.double(), padding), size, strides)
    return Sum(
        require_int32((means * count).round().to(torch.int64), node.name or ""), x.scale / count, node.name or ""
    )


def _limit(node: ir.Node, inputs: list[Any]) -> Integers:
    x, low, high = inputs
    return Integers(x.values.clamp(int(low), int(high)), x.scale, x.zero_point)


def _moved(move: Callable[[ir.Node, Tensor, list[Any], int], Tensor]) -> Callable[[ir.Node, list[Any]], Any]:
    """An operator that changes no value, of integers or of a sum."""

    def operator(node: ir.Node, inputs: list[Any]) -> Any:
        x, *others = inputs
        if isinstance(x, Sum):
            scale = x.scale if x.scale.numel() == 1 else x.scale.expand(x.values.shape)
            moved = move(node, scale, others, 0) if scale.numel() > 1 else scale
            return Sum(move(node, x.values, others, 0), moved, x.where)
        if isinstance(x, Tensor):
            return move(node, x, others, 0)
        return Integers(move(node, x.values, others, x.zero_point), x.scale, x.zero_point)

    return operator


def _reshape(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    lengths = [x.shape[i] if length == 0 and not attribute_of(node, "allowzero", 0) else length
               for i, length in enumerate(others[0].tolist())]  # fmt: skip
    return x.reshape(lengths)


def _flatten(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    axis = attribute_of(node, "axis", 1)
    return x.reshape(x.shape[:axis].numel(), -1)


def _squeeze(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    return x.squeeze(tuple(others[0].tolist()))


def _unsqueeze(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    for axis in sorted(others[0].tolist()):
        x = x.unsqueeze(axis)
    return x


def _slice(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    starts, ends = others[0].tolist(), others[1].tolist()
    axes = others[2].tolist() if len(others) > 2 and others[2] is not None else list(range(len(starts)))
    steps = others[3].tolist() if len(others) > 3 and others[3] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index = [slice(None)] * x.dim()
        index[axis] = slice(start, end, step)
        x = x[tuple(index)]
    return x


def _pad(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    amounts = others[0].tolist()
    half = len(amounts) // 2
    return F.pad(x, [amount for i in reversed(range(half)) for amount in (amounts[i], amounts[half + i])], value=zero)


def _max_pool(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    size = list(attribute_of(node, "kernel_shape", ()))
    if len(size) != 2:
        raise NotImplementedError(f"{node.name}: only maxima over images are computed here.")
    pads = attribute_of(node, "pads", [0] * 2 * len(size))
    padding = [amount for i in reversed(range(len(size))) for amount in (pads[i], pads[len(size) + i])]
    lowest = F.pad(x.double(), padding, value=float("-inf"))
    strides = list(attribute_of(node, "strides", [1] * len(size)))
    dilations = list(attribute_of(node, "dilations", [1] * len(size)))
    ceil_mode = bool(attribute_of(node, "ceil_mode", 0))
    return F.max_pool2d(lowest, size, strides, dilation=dilations, ceil_mode=ceil_mode).to(torch.int64)


def _transpose(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    return x.permute(*attribute_of(node, "perm", list(reversed(range(x.dim())))))


def _shape(node: ir.Node, inputs: list[Any]) -> Tensor:
    (x,) = inputs
    lengths = (x if isinstance(x, Tensor) else x.values).shape
    return torch.tensor(lengths[attribute_of(node, "start", 0) : attribute_of(node, "end", None)], dtype=torch.int64)


def _concatenate(node: ir.Node, inputs: list[Any]) -> Any:
    first = inputs[0]
    if isinstance(first, Tensor):
        return torch.cat(inputs, attribute_of(node, "axis", 0))
    same = all(torch.equal(x.scale, first.scale) and x.zero_point == first.zero_point for x in inputs)
    if not same:
        raise NotImplementedError(f"{node.name}: joins of different grids are not computed in integers here.")
    joined = torch.cat([x.values for x in inputs], attribute_of(node, "axis", 0))
    return Integers(joined, first.scale, first.zero_point)


OPERATORS: dict[str, Callable[[ir.Node, list[Any]], Any]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _convolution,
    "Gemm": _linear,
    "MatMul": _linear,
    "Add": _add,
    "AveragePool": _average,
    "GlobalAveragePool": _average,
    "Clip": _limit,
    "Reshape": _moved(_reshape),
    "Flatten": _moved(_flatten),
    "Squeeze": _moved(_squeeze),
    "Unsqueeze": _moved(_unsqueeze),
    "Slice": _moved(_slice),
    "Pad": _moved(_pad),
    "MaxPool": _moved(_max_pool),
    "Transpose": _moved(_transpose),
    "Concat": _concatenate,
    "Shape": _shape,
}
