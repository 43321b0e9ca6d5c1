"""Running an exported convolutional network in integers alone, and where that leaves the fake-quantized one."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..extras import needs_extra

try:
    import onnx_ir as ir
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{needs_extra('Computing in integers', error.name, 'export')}.") from error

from ..module import QuantizationModule
from .integer_operators import OPERATORS, Integers, Sum
from .onnx_file import inputs_of


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


def _constant(value: ir.Value) -> Tensor:
    """Numbers of an initializer; those of 4 bits in 8."""
    assert value.const_value is not None
    numbers = value.const_value.numpy()
    is_packed = value.const_value.dtype in (ir.DataType.INT4, ir.DataType.UINT4)
    return torch.from_numpy(numbers.astype(np.int8) if is_packed else numbers.copy())


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
    integers: dict[str, list[Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"There is no file {self.path}.")
        self._graph = ir.load(self.path).graph
        self._constants = {value.name: _constant(value) for value in self._graph.initializers.values()}

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Compute the (first) output for a batch, float32; ``integers`` then holds what each layer has read
        as its operands, and what was quantized on the way there.

        Raises:
            NotImplementedError: If the network has an operator that is not computed in integers here.
            OverflowError: If a sum does not fit 32 bits.
        """
        self.integers = {}
        names = [value.name for value in self._graph.inputs]
        if len(names) != 1:
            raise NotImplementedError(f"The network has {len(names)} inputs; only networks of one are run in integers.")
        found: dict[Any, Any] = {names[0]: x.float(), **self._constants}
        for node in self._graph:
            inputs: list[Any] = [None if value is None else found[value.name] for value in node.inputs]
            if node.op_type not in OPERATORS:
                raise NotImplementedError(
                    f"{node.name}: {node.op_type} is not computed in integers here; networks of convolutions, linear "
                    "layers, additions and pools are."
                )
            try:
                found[node.outputs[0].name] = OPERATORS[node.op_type](node, inputs)
            except (AttributeError, TypeError) as error:
                raise NotImplementedError(
                    f"{node.name}: {node.op_type} of numbers that are no integers any longer is not computed here."
                ) from error
            if node.op_type in ("QuantizeLinear", "Clip"):
                layer = (node.name or "").partition("/")[0]
                read = self.integers.setdefault(layer, [])
                if node.op_type == "Clip" and read and read[-1] is inputs[0].values:
                    read.pop()
                read.append(found[node.outputs[0].name].values)
        output = found[self._graph.outputs[0].name]
        return output.real if isinstance(output, Sum | Integers) else output

    @torch.no_grad()
    def compare(self, module: QuantizationModule, batch: Any) -> list[GridDifference]:
        """Compare the integers that layers read with those of the fake-quantized module.

        Args:
            module: The module that was exported.
            batch: A calibration batch.

        Returns:
            A line for each layer that the file names and that is called once, in the order of execution.
        """
        args, kwargs = inputs_of(module, batch)
        wanted: dict[str, Tensor] = {}
        calls: Counter[str] = Counter()

        def see(name: str) -> Callable[..., None]:
            def hook(layer: nn.Module, args: Any) -> None:
                quantizer = module.network.layers[name].input_quantizers[0]
                calls[name] += 1
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
            # Parts of it may have been quantized before they were joined.
            given = next((v for v in self.integers.get(name, ()) if v.numel() == codes.numel()), None)
            if given is not None and calls[name] == 1:
                steps = (given.reshape(-1) - codes.reshape(-1)).abs()
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
