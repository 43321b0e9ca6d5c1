"""Every operand of the matrix products that a model computes, by how it was computed."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_calibtip.quantization.quantizers import Quantizer
from lightning_calibtip.quantization.spec import PerChannel


class Products(TorchFunctionMode):
    """Every operand of a matrix product or a table look-up, by how it was computed."""

    FUNCTIONS = (
        F.linear,
        torch.matmul,
        torch.bmm,
        torch.addmm,
        F.embedding,
        torch.Tensor.matmul,
        F.conv2d,
        torch.einsum,
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[bool]]] = []
        self.on_grid: dict[int, torch.Tensor] = {}
        self.handles = [m.register_forward_hook(self.note) for m in model.modules() if isinstance(m, Quantizer)]

    def note(self, quantizer: Quantizer, args, output) -> None:
        if quantizer.enabled:
            spec, granularity = quantizer.spec, quantizer.spec.granularity
            axis = granularity.axis if isinstance(granularity, PerChannel) else None
            shape = [-1 if d == axis else 1 for d in range(output.dim())]
            scale, point = (t if axis is None else t.view(shape) for t in (quantizer.scale, quantizer.zero_point))
            integers = output / scale + point
            assert float((integers - integers.round()).abs().max()) < 1e-2
            assert spec.qmin - 0.01 <= float(integers.min()) <= float(integers.max()) <= spec.qmax + 0.01
            self.on_grid[id(output)] = output

    def is_on_grid(self, operand: torch.Tensor) -> bool:
        # A transposed or flattened view is on the grid as well.
        return id(operand) in self.on_grid or (operand._base is not None and id(operand._base) in self.on_grid)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.FUNCTIONS:
            operands = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dim() > 1]
            self.seen.append((func.__name__, [self.is_on_grid(operand) for operand in operands]))
        return func(*args, **(kwargs or {}))


def products_of(module, *args, **kwargs) -> list[tuple[str, list[bool]]]:
    products = Products(module.model)
    with torch.no_grad(), products:
        module.model(*args, **kwargs)
    return products.seen
