"""Running an exported convolutional network in integers alone, and where that leaves the fake-quantized one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..module import QuantizationModule
from .fixed_point import fixed_point, require_int32, rescale
from .onnx_file import inputs_of

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


@dataclass(frozen=True)
class GridDifference:
    """Where integers differ from those of the fake-quantized network.

    Args:
        layer: Layer that reads the integers.
        share: Share of them that differ.
        steps: Greatest difference, in steps of the grid.

    Example:
        >>> GridDifference("conv1", share=0.0002, steps=1).steps
        1
    """

    layer: str
    share: float
    steps: int


@dataclass
class IntegerNetwork:
    """An exported network whose layers, additions and pools compute with integers alone.

    Products are accumulated in int32 and rescaled by a fixed-point multiplier and a shift (``fixed_point``); ReLU and
    ReLU6 are the limits of the integers that follow; both operands of an addition are rescaled to one grid first. Real
    numbers come in at the first quantizer and go out after the last sum.

    Args:
        path: File of ``export_onnx``, of a network of convolutions, linear layers, additions and pools.

    Raises:
        FileNotFoundError: If there is no such file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_calibtip import export_onnx, quantize
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> x = torch.randn(32, 1, 4, 4)
        >>> options = {"accelerator": "cpu"}
        >>> module = quantize(net, [x], pipeline="calibrate", target="onnxruntime", trainer_options=options).module
        >>> with TemporaryDirectory() as folder:
        ...     _ = export_onnx(module, f"{folder}/net.onnx", x, check=False)
        ...     network = IntegerNetwork(Path(folder) / "net.onnx")
        >>> float((network(x) - module(x)).abs().max()) < 0.05 * float(module(x).abs().max())
        True
    """

    path: Path
    integers: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"There is no file {self.path}.")
        self._graph = ir.load(self.path).graph

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Compute the (first) output for a batch, float32; ``integers`` then holds what each layer has read.

        Raises:
            NotImplementedError: If the network has an operator that is not computed in integers here.
            OverflowError: If a sum does not fit 32 bits.
        """
        self.integers = {}
        (name,) = [value.name for value in self._graph.inputs]
        found: dict[str, Any] = {name: x.float()}
        for value in self._graph.initializers.values():
            assert value.const_value is not None and value.name is not None
            found[value.name] = torch.from_numpy(value.const_value.numpy().copy())
        for node in self._graph:
            inputs = [None if value is None else found[value.name] for value in node.inputs]
            if node.op_type not in _OPERATORS:
                raise NotImplementedError(
                    f"{node.name}: {node.op_type} is not computed in integers here; networks of convolutions, linear "
                    "layers, additions and pools are."
                )
            found[node.outputs[0].name or ""] = _OPERATORS[node.op_type](node, inputs)
            if node.op_type == "QuantizeLinear":
                layer = (node.name or "").partition("/")[0]
                self.integers.setdefault(layer, found[node.outputs[0].name or ""].values)
        output = found[self._graph.outputs[0].name or ""]
        return output.real if isinstance(output, Sum) else output

    @torch.no_grad()
    def compare(self, module: QuantizationModule, batch: Any) -> list[GridDifference]:
        """Compare the integers that layers read with those of the fake-quantized module.

        Args:
            module: The module that was exported.
            batch: A calibration batch.

        Returns:
            A line for each layer that the file names, in the order of execution.
        """
        args, kwargs = inputs_of(module, batch)
        wanted: dict[str, Tensor] = {}

        def see(name: str) -> Callable[..., None]:
            def hook(layer: nn.Module, args: Any) -> None:
                quantizer = module.network.layers[name].input_quantizers[0]
                if quantizer is not None:
                    wanted[name] = quantizer.encode(args[0]).cpu().long()

            return hook

        handles = [
            layer.module.register_forward_pre_hook(see(name), prepend=True)
            for name, layer in module.network.layers.items()
            if layer.tensors
        ]
        try:
            with module.network.quantized(True):
                module.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self(next(iter([*args, *kwargs.values()])).cpu())
        lines = []
        for name, codes in wanted.items():
            if name in self.integers and self.integers[name].numel() == codes.numel():
                steps = (self.integers[name].reshape(-1) - codes.reshape(-1)).abs()
                lines.append(GridDifference(name, float((steps > 0).double().mean()), int(steps.max())))
        return lines

    def agreement(self, module: QuantizationModule, batches: Iterable[Any]) -> float:
        """Share of decisions (greatest outputs) that are those of the fake-quantized module.

        Args:
            module: The module that was exported.
            batches: Calibration batches.

        Raises:
            ValueError: If there is no batch.
        """
        same = total = 0
        for batch in batches:
            args, kwargs = inputs_of(module, batch)
            with torch.no_grad(), module.network.quantized(True):
                wanted = module.model(*args, **kwargs).cpu().argmax(-1)
            given = self(next(iter([*args, *kwargs.values()])).cpu()).argmax(-1)
            same, total = same + int((given == wanted).sum()), total + wanted.numel()
        if not total:
            raise ValueError("There is no batch to compare on.")
        return same / total


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


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


def _accumulate(node: ir.Node, x: Integers, w: Integers, bias: Integers | None, products: Tensor) -> Sum:
    sums = products.round().to(torch.int64)
    shape = [1, -1, *[1] * (sums.dim() - 2)]
    if bias is not None:
        sums = sums + bias.values.view(shape)
    scale = x.scale * (w.scale.view(shape) if w.scale.dim() else w.scale)
    return Sum(require_int32(sums, node.name or ""), scale, node.name or "")


def _convolution(node: ir.Node, inputs: list[Any]) -> Sum:
    x, w, bias = (*inputs, None)[:3]
    dims = w.values.dim() - 2
    pads = _attribute(node, "pads", [0] * 2 * dims)
    # Sums of integers are exact in float64.
    padding = [amount for i in reversed(range(dims)) for amount in (pads[i], pads[dims + i])]
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    products = convolve(
        F.pad(x.centred.double(), padding),
        w.values.double(),
        stride=tuple(_attribute(node, "strides", [1] * dims)),
        dilation=tuple(_attribute(node, "dilations", [1] * dims)),
        groups=_attribute(node, "group", 1),
    )
    return _accumulate(node, x, w, bias, products)


def _linear(node: ir.Node, inputs: list[Any]) -> Sum:
    x, w, bias = (*inputs, None)[:3]
    weight = w.values.double()
    weight = weight if _attribute(node, "transB", 0) else weight.t()
    return _accumulate(node, x, w, bias, F.linear(x.centred.double(), weight))


def _add(node: ir.Node, inputs: list[Any]) -> Sum:
    first, second = inputs
    unit = 2 * torch.maximum(first.scale, second.scale) / 2**_ADDITION_BITS
    parts = [rescale(part.centred, fixed_point(part.scale / unit)) for part in (first, second)]
    return Sum(require_int32(parts[0] + parts[1], node.name or ""), unit, node.name or "")


def _average(node: ir.Node, inputs: list[Any]) -> Sum:
    (x,) = inputs
    size = list(_attribute(node, "kernel_shape", x.values.shape[2:]))
    strides = list(_attribute(node, "strides", [1] * len(size)))
    pads = _attribute(node, "pads", [0] * 2 * len(size))
    if any(pads) and not _attribute(node, "count_include_pad", 0):
        raise NotImplementedError(f"{node.name}: averages that leave padding out are not computed in integers here.")
    padding = [amount for i in reversed(range(len(size))) for amount in (pads[i], pads[len(size) + i])]
    count = 1
    for length in size:
        count *= int(length)
    means = F.avg_pool2d(F.pad(x.centred.double(), padding), size, strides)
    return Sum(require_int32((means * count).round().to(torch.int64), node.name or ""), x.scale / count, node.name or "")


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
    lengths = [x.shape[i] if length == 0 and not _attribute(node, "allowzero", 0) else length
               for i, length in enumerate(others[0].tolist())]  # fmt: skip
    return x.reshape(lengths)


def _flatten(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    axis = _attribute(node, "axis", 1)
    return x.reshape(*x.shape[:axis].numel() and [x.shape[:axis].numel()], -1)


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
    size = list(_attribute(node, "kernel_shape", ()))
    pads = _attribute(node, "pads", [0] * 2 * len(size))
    padding = [amount for i in reversed(range(len(size))) for amount in (pads[i], pads[len(size) + i])]
    lowest = F.pad(x.double(), padding, value=float("-inf"))
    strides = list(_attribute(node, "strides", [1] * len(size)))
    dilations = list(_attribute(node, "dilations", [1] * len(size)))
    ceil_mode = bool(_attribute(node, "ceil_mode", 0))
    return F.max_pool2d(lowest, size, strides, dilation=dilations, ceil_mode=ceil_mode).to(torch.int64)


def _transpose(node: ir.Node, x: Tensor, others: list[Any], zero: int) -> Tensor:
    return x.permute(*_attribute(node, "perm", list(reversed(range(x.dim())))))


def _concatenate(node: ir.Node, inputs: list[Any]) -> Any:
    first = inputs[0]
    if isinstance(first, Tensor):
        return torch.cat(inputs, _attribute(node, "axis", 0))
    same = all(torch.equal(x.scale, first.scale) and x.zero_point == first.zero_point for x in inputs)
    if not same:
        raise NotImplementedError(f"{node.name}: joins of different grids are not computed in integers here.")
    joined = torch.cat([x.values for x in inputs], _attribute(node, "axis", 0))
    return Integers(joined, first.scale, first.zero_point)


_OPERATORS: dict[str, Callable[[ir.Node, list[Any]], Any]] = {
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
}
