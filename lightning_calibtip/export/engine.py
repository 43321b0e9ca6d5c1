"""ONNX Runtime: what it makes of a file, what it computes, how long it takes."""

import statistics
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from .report import LayerOperator

# Operators of ONNX Runtime that multiply, add or average integers.
INTEGER_OPERATORS = {
    "QLinearConv", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool",
    "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul",
    "QAttention", "MatMulNBits", "GatherBlockQuantized",
}  # fmt: skip
_FLOAT_OPERATORS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "AveragePool",
                    "GlobalAveragePool", "ConvTranspose"}  # fmt: skip
# What multiplies with the weights of a module that are layers of their own.
_FLOAT_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Einsum", "LSTM", "GRU", "RNN"}


def make_session(path: str | Path, threads: int | None = None, optimized: Path | None = None) -> Any:
    """Open a file on the CPU.

    Args:
        path: An ONNX file.
        threads: Number of threads; ONNX Runtime's own choice if None.
        optimized: File that the optimized graph, without what fits this machine alone, is written to.

    Example:
        See ``export_onnx``.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Signed activations stay signed: ONNX Runtime fails on the way from some of them to unsigned ones.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs for one batch; entries that the file does not take are left out.

    Example:
        See ``export_onnx``.
    """
    names = {value.name for value in session.get_inputs()}
    outputs: list[np.ndarray] = session.run(None, {name: value for name, value in feeds.items() if name in names})
    return outputs


def median_seconds(session: Any, feeds: Mapping[str, np.ndarray], runs: int = 10) -> float:
    """Median seconds of a run on one batch, after one that does not count.

    Example:
        See ``export_onnx``.
    """
    run_session(session, feeds)
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        run_session(session, feeds)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def optimized_operators(path: str | Path, layers: Collection[str], owners: Collection[str] = ()) -> list[LayerOperator]:
    """Operators that ONNX Runtime computes the layers by, in the order of its optimized graph.

    Args:
        path: File of ``export_onnx``, whose nodes are named after the layers.
        layers: Full names of the layers.
        owners: Full names of the modules whose own products have weights that are layers; ``""`` for the model itself.

    Example:
        See ``export_onnx``.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        make_session(path, optimized=optimized)
        graph = onnx.load(str(optimized)).graph
    integers = {tensor.name for tensor in graph.initializer if tensor.data_type not in (1, 10, 11, 16)}
    found: dict[str, LayerOperator] = {}
    for node in graph.node:
        layer = node.name.partition("/")[0] if "/" in node.name else ""
        if layer in owners and (node.op_type in INTEGER_OPERATORS or node.op_type in _FLOAT_PRODUCTS):
            name, is_integer = layer or "the model itself", node.op_type in INTEGER_OPERATORS
            # Only if all of them are.
            if name not in found or not is_integer:
                found[name] = LayerOperator(name, node.op_type, is_integer)
            continue
        is_lookup = node.op_type == "Gather" and node.input[0] in integers
        if layer in layers and (node.op_type in INTEGER_OPERATORS | _FLOAT_OPERATORS or is_lookup):
            is_integer = is_lookup or node.op_type in INTEGER_OPERATORS
            if layer not in found or (is_integer and not found[layer].integer):
                found[layer] = LayerOperator(layer, node.op_type, is_integer)
    return [*found.values(), *(LayerOperator(layer, None, False) for layer in layers if layer not in found)]
