"""Engines and files that inference is compared on, each as a function of a batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_calibtip.export.engine import make_session, run_session

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Contender:
    """A file in an engine.

    Args:
        name: Name for tables.
        file_bytes: Size of the file; None where there is none.
        run: Computes the outputs of a batch, on one thread.
    """

    name: str
    file_bytes: int | None
    run: Callable[[Feeds], list[np.ndarray]]


def onnxruntime_contender(name: str, path: Path) -> Contender:
    """A file in ONNX Runtime."""
    session = make_session(path, threads=1)
    return Contender(name, path.stat().st_size, lambda feeds: run_session(session, feeds))


def openvino_contender(name: str, model: Any) -> Contender:
    """A file, or a model of OpenVINO, in OpenVINO."""
    import openvino

    core = openvino.Core()
    size = model.stat().st_size if isinstance(model, Path) else None
    options = {"INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(str(model)) if isinstance(model, Path) else model, "CPU", options)
    names = [value.get_any_name() for value in compiled.inputs]

    def run(feeds: Feeds) -> list[np.ndarray]:
        results = compiled([feeds[name] for name in names])
        return [results[output] for output in compiled.outputs]

    return Contender(name, size, run)


def export_float(model: nn.Module, example: Mapping[str, Tensor], path: Path) -> None:
    """Write the float model as an ONNX file with the same free dimensions as the quantized one."""
    shapes = {name: {0: "batch", **({1: "tokens"} if value.dim() == 2 else {})} for name, value in example.items()}
    program = torch.onnx.export(
        model.eval(), (), kwargs=dict(example), dynamo=True, opset_version=18, dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    program.save(str(path))


def quantize_static(source: Path, batches: Iterable[Feeds], path: Path) -> None:
    """Quantize a float file by ONNX Runtime's own tool: unsigned activations, weights by channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> Any:
            return next(self.batches, None)

    prepared = path.with_suffix(".float.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


def quantize_nncf(source: Path, batches: Sequence[Feeds], is_transformer: bool) -> Any:
    """Quantize a float file by NNCF; returns a model of OpenVINO."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(source))
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    dataset = nncf.Dataset(list(batches))
    return nncf.quantize(model, dataset, subset_size=len(batches), model_type=kind)


class EngineNet(nn.Module):
    """Takes the place of a network in a LightningModule, so that the module validates an engine's file.

    Args:
        contender: The file.
        inputs: Names of its inputs, in the order of positional arguments.
        outputs: Names of the outputs that the module asks for; a single tensor if None.
    """

    def __init__(self, contender: Contender, inputs: Sequence[str], outputs: Sequence[str] | None) -> None:
        super().__init__()
        self.contender, self.inputs, self.outputs = contender, inputs, outputs

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Compute the batch in the engine."""
        given = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        values = self.contender.run({name: value.numpy() for name, value in given.items()})
        found = [torch.from_numpy(np.asarray(value)) for value in values]
        return found[0] if self.outputs is None else SimpleNamespace(**dict(zip(self.outputs, found, strict=True)))
