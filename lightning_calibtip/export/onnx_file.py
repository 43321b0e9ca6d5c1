"""export_onnx: a quantized module as an ONNX file of integers, checked in the engine."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..batch_arguments import batch_arguments
from ..batches import is_object
from ..extras import needs_extra
from ..files.atomic import write_atomically
from ..module import QuantizationModule
from ..network.routing import routed_by_hooks
from ..network.targets import Target, find_target, require_engine
from ..user_model import require_quantized_module
from .report import ExportReport

log = logging.getLogger(__name__)

# Integers of 8 bits that are rounded otherwise, and all that follows from them, stay below this part of an output.
_LARGE_DIFFERENCE = 0.1

# Advice where the shapes of inputs may be what cannot be exported.
_OR_NAME = ", or say which dimensions are free: dynamic={input: {dimension: name}}, or False for none"

# Protobuf files end here.
_LARGEST_FILE = 2**31 - 1


def export_onnx(
    module: QuantizationModule,
    path: str | Path,
    batch: Any,
    target: str | None = None,
    dynamic: bool | Mapping[str, Any] = True,
    int4: bool = False,
    check: bool = True,
) -> ExportReport:
    """Write a calibrated module as an ONNX file (opset 21) with integer weights, that engines run in integers.

    Quantizers become QuantizeLinear and DequantizeLinear, whose arithmetic (division, ties to even) is the model's own;
    weights are stored as integers, biases as int32 on the grid of the products. No operator is of a custom domain.

    Args:
        module: Calibrated module, reconstructed or not; it stays as it is.
        path: File to write; a file of that name is replaced, completely or not at all.
        batch: A calibration batch, of which the default ``calibration_step`` would pass on the same inputs.
        target: Name of a target, whose formats the module must have; its own if None.
        dynamic: Whether the number of samples is free, and the number of tokens of integer inputs, of masks, and of
            embeddings that are as long as these; or a mapping as in ``torch.onnx.export(dynamic_shapes=...)``.
        int4: Whether weights of at most 4 bits are stored in 4 bits, but those of embeddings. That halves their size;
            ONNX Runtime multiplies 8-bit integers faster, though.
        check: Whether ONNX Runtime opens the file, and is compared with the torch model on the batch, before it is
            written.

    Returns:
        Size, operators, differences and latency.

    Raises:
        RuntimeError: If the module is not calibrated.
        ValueError: If the target cannot run the module's formats, a quantizer has no ONNX operators, ``torch.onnx``
            cannot export the model, the batch does not fit it, the model lies on several devices or has parameters of
            another type than float32, ONNX Runtime cannot run the file, or the file would be too large.
        ModuleNotFoundError: If a package of the extra ``export`` is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from lightning_calibtip import quantize
        >>> batch = torch.randn(8, 4)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> options = {"accelerator": "cpu"}
        >>> run = quantize(net, [batch], pipeline="calibrate", target="onnxruntime", trainer_options=options)
        >>> with TemporaryDirectory() as folder:
        ...     report = export_onnx(run.module, f"{folder}/model.onnx", batch)
        >>> report.counts
        {'QGemm': 2}
    """
    require_packages(check)
    require_quantized_module(module, "export_onnx")
    path, network = Path(path), module.network
    if not network.calibrated:
        raise RuntimeError("The module has no ranges yet, so nothing can be exported: run Calibration first.")
    target = network.scheme.target if target is None else target
    engine = None if target is None else find_target(target)
    for name, layer in network.layers.items():
        require_engine(name, layer.type, layer.config, "an ONNX file")
        if engine is not None:
            engine.check_config(name, layer.type, layer.config)
    _require_one_device(module)
    _require_float32(module)
    args, kwargs = inputs_of(module, batch)
    wanted = _reference(module, args, kwargs)
    content = _serialized(module, args, kwargs, dynamic, engine, int4)
    report = ExportReport(path, target, len(content), network.float_bytes)
    if check:
        report = _checked(report, content, module, args, kwargs, wanted)
    write_atomically(path, content)
    return report


def require_packages(check: bool = True) -> None:
    """Raise ``ModuleNotFoundError`` if a package that exporting needs is missing.

    Args:
        check: Whether the file is to be checked in ONNX Runtime.

    Example:
        >>> require_packages()
    """
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401

        if check:
            import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            needs_extra("Exporting", error.name, "export")
            + (" (or leave the check out: check=False)." if error.name == "onnxruntime" else ".")
        ) from error


def _require_one_device(module: QuantizationModule) -> None:
    devices = {tensor.device for tensor in [*module.model.parameters(), *module.model.buffers()]}
    if len(devices) > 1:
        raise ValueError(
            f"The model lies on several devices ({', '.join(sorted(map(str, devices)))}): move it to one, module.to("
            "'cpu'), to export it."
        )


def _require_float32(module: QuantizationModule) -> None:
    kinds = {parameter.dtype for parameter in module.model.parameters() if parameter.is_floating_point()}
    if others := sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32}):
        raise ValueError(
            f"The model has parameters of the type {', '.join(others)}; engines dequantize to float32: quantize the "
            "model in float32, model.float()."
        )


def inputs_of(module: QuantizationModule, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model's ``forward`` in a calibration batch, on the model's device.

    Example:
        >>> from torch import nn
        >>> module = QuantizationModule(nn.Sequential(nn.Linear(2, 2)))
        >>> args, kwargs = inputs_of(module, (torch.ones(1, 2), "label"))
        >>> len(args), kwargs
        (1, {})
    """
    args, kwargs = batch_arguments(module.model, batch)
    device = next((tensor.device for tensor in module.model.parameters()), torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if taken := next((type(value).__name__ for value in (*args, *kwargs.values()) if is_object(value)), ""):
        raise ValueError(
            f"{type(module.model).__name__}.forward takes a {taken} as a whole, and a file has tensors for inputs: "
            "export a module whose forward takes tensors by name (x, edge_index)."
        )
    # A file has tensors for inputs.
    named = {name: moved(value) for name, value in kwargs.items() if isinstance(value, Tensor)}
    return tuple(map(moved, args)), named


@torch.no_grad()
def _reference(module: QuantizationModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What the quantized torch model makes of the batch."""
    try:
        with module.network.quantized(True):
            output = module.model(*args, **kwargs)
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        raise ValueError(
            f"The batch does not fit the model ({type(error).__name__}: {error}); its tensors have the shapes "
            f"{shapes}. Give a batch like those of calibration."
        ) from error
    return [leaf.float().cpu() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _serialized(
    module: QuantizationModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: bool | Mapping[str, Any],
    engine: Target | None,
    int4: bool,
) -> bytes:
    import onnx
    import onnx_ir

    from .graph import rewrite
    from .symbolic import OPSET, deployable_copy

    copied = deployable_copy(module, engine is not None and engine.signed_activations)
    args = tuple(value.cpu() if isinstance(value, Tensor) else value for value in args)
    kwargs = {name: value.cpu() for name, value in kwargs.items()}
    with warnings.catch_warnings(), torch.no_grad(), routed_by_hooks(copied):
        warnings.simplefilter("ignore")
        shapes = _dynamic_shapes(args, kwargs, dynamic)
        try:
            program = torch.onnx.export(
                copied, args, kwargs=kwargs, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False
            )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(
                f"torch.onnx cannot export {type(module.model).__name__}: {_reason(error.__cause__ or error)} A graph "
                "has no steps that depend on values (lengths of packed sequences, loops until something is found): "
                f"export the part of the model without them{_OR_NAME if dynamic else ''}."
            ) from error
    assert program is not None
    rewrite(program.model, set(module.network.layers), int4)
    proto = onnx_ir.to_proto(program.model)
    if proto.ByteSize() > _LARGEST_FILE:
        raise ValueError(f"The file would have {proto.ByteSize():,} bytes; ONNX files end at {_LARGEST_FILE:,}.")
    onnx.checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString()
    return content


def _reason(error: BaseException) -> str:
    """First line of an error's text, with the next one where it announces that."""
    lines = [line.strip(" -") for line in str(error).strip().splitlines()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__


def _dynamic_shapes(args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool | Mapping[str, Any]) -> Any:
    if not isinstance(dynamic, bool):
        return dynamic
    if not dynamic:
        return None

    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    # Of token ids and of masks; embeddings beside a mask are as long as it is.
    lengths = {value.shape[1] for value in tensors if value.dim() == 2 and not value.is_floating_point()}

    def free(value: Any) -> dict[int, str] | None:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return None
        has_tokens = value.dim() > 2 if value.is_floating_point() else value.dim() == 2
        return {0: "batch", **({1: "tokens"} if has_tokens and value.shape[1] in lengths else {})}

    return {name: free(value) for name, value in kwargs.items()} if kwargs else tuple(map(free, args))


def _checked(
    report: ExportReport,
    content: bytes,
    module: QuantizationModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wanted: list[Tensor],
) -> ExportReport:
    """The report with what ONNX Runtime makes of the file's content."""
    from .engine import make_session, median_seconds, optimized_operators, run_session

    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "checked.onnx"
        file.write_bytes(content)
        try:
            session = make_session(file, threads)
            parts = {name for name, layer in module.network.layers.items() if layer.type.part}
            owners = {name.rpartition(".")[0] for name in parts}
            operators = optimized_operators(file, [name for name in module.network.layers if name not in parts], owners)
            names = [value.name for value in session.get_inputs()]
            values = list(kwargs.items()) if kwargs else list(zip(names, args, strict=False))
            feeds = {name: value.detach().cpu().numpy() for name, value in values}
            outputs = [torch.from_numpy(output) for output in run_session(session, feeds)]
            latency = median_seconds(session, feeds)
        except Exception as error:
            raise ValueError(
                f"ONNX Runtime cannot run the file ({error}); check=False writes it for other engines."
            ) from error
    difference, agreement = _compare(outputs, wanted)
    checked = replace(
        report,
        operators=tuple(operators),
        difference=difference,
        agreement=agreement,
        latency=latency,
        threads=threads,
    )
    if difference > _LARGE_DIFFERENCE:
        log.warning("The file's output differs from torch by %.2g of its range in ONNX Runtime.", difference)
    if checked.float_layers:
        log.warning("ONNX Runtime computes %s in float.", ", ".join(checked.float_layers))
    return checked


def _compare(outputs: list[Tensor], wanted: list[Tensor]) -> tuple[float, float | None]:
    """Greatest relative difference, and share of equal decisions; numbers that the model returns are left out."""
    differences, agreed, decisions = [0.0], 0, 0
    remaining = list(outputs)
    for reference in wanted:
        output = next((each for each in remaining if each.shape == reference.shape), None)
        if output is None:
            raise ValueError(
                f"The file gives no output of the shape {tuple(reference.shape)}, which the model returns."
            )
        remaining = [each for each in remaining if each is not output]
        output = output.float()
        differences.append(float((output - reference).abs().max() / reference.abs().max().clamp_min(1e-12)))
        # Classes of images and of pixels lie along the second dimension, those of tokens along the last.
        axis = 1 if reference.dim() > 3 else -1
        if reference.dim() > 1 and reference.shape[axis] > 1:
            same = output.argmax(axis) == reference.argmax(axis)
            agreed, decisions = agreed + int(same.sum()), decisions + same.numel()
    return max(differences), agreed / decisions if decisions else None
