"""Rewriting an exported graph into the forms that engines recognise as integers; no rewriting changes a result."""

import ast
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from .graph_values import constant, new_initializer
from .patterns import (
    flatten_product,
    integer_bias,
    limit_integers,
    pad_in_convolution,
    pool_globally,
    quantize_before_moves,
    transpose_weight,
)

# Where the exporter says which module a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"


def rewrite(model: ir.Model, layers: set[str], int4: bool) -> None:
    """Rewrite a graph in place.

    - Nodes are named after the layer whose ``forward`` computes them.
    - What is quantized after slices, paddings, reshapes, maxima and joins is quantized before them, too.
    - Activation functions before a quantizer become the limits of its integers.
    - Zero paddings become those of the convolution after them; means over an image become global pools.
    - Transposed weights are stored transposed; linear layers whose input has one unknown dimension become Gemm (ONNX
      Runtime makes float Gemm of them, before it looks for integers).
    - Biases of convolutions and of Gemm are integers where they lie on the grid of the products (scale of the input
      times scale of the weight), as they do in layers with an integer bias.
    - No two nodes share an initializer, names of values are short, and no metadata is kept.

    Args:
        model: From ``torch.onnx.export`` of a ``deployable_copy``.
        layers: Names of the quantized layers.
        int4: Whether weights of at most 4 bits are stored in 4 bits, not 8; those of embeddings stay at 8.

    Example:
        See ``export_onnx``.
    """
    graph = model.graph
    _name_nodes(graph, layers)
    for quantize in _nodes(graph, "QuantizeLinear"):
        quantize_before_moves(graph, quantize)
    for quantize in _nodes(graph, "QuantizeLinear"):
        limit_integers(graph, quantize)
    for pad in _nodes(graph, "Pad"):
        pad_in_convolution(graph, pad)
    for mean in _nodes(graph, "ReduceMean"):
        pool_globally(graph, mean)
    for transpose in _nodes(graph, "Transpose"):
        transpose_weight(graph, transpose)
    flattened: dict[ir.Value, ir.Value] = {}
    for product in _nodes(graph, "MatMul"):
        flatten_product(graph, product, flattened)
    for product in [*_nodes(graph, "Conv"), *_nodes(graph, "Gemm")]:
        integer_bias(graph, product)
    _separate_initializers(graph)
    if int4:
        for dequantize in _nodes(graph, "DequantizeLinear"):
            _store_in_4_bits(graph, dequantize)
    RemoveUnusedNodesPass()(model)
    graph.sort()
    _shorten_names(graph)
    ClearMetadataAndDocStringPass()(model)


def _nodes(graph: ir.Graph, op_type: str) -> Iterator[ir.Node]:
    """Nodes of one type, of those that are in the graph at first."""
    return iter([node for node in graph if node.op_type == op_type])


def _name_nodes(graph: ir.Graph, layers: set[str]) -> None:
    taken: set[str] = set()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        layer = next((scope for scope in reversed(scopes[:-1]) if scope in layers), None)
        module = layer or next((scope for scope in reversed(scopes[:-1]) if scope), "")
        name, count = f"{module}/{node.op_type}".removeprefix("/"), 1
        unique = name
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken.add(unique)
        node.name = unique


def _separate_initializers(graph: ir.Graph) -> None:
    """Give each reader an initializer of its own: engines' passes change the one of a reader for all others."""
    for value in list(graph.initializers.values()):
        for count, (node, position) in enumerate(list(value.uses())[1:], start=1):
            assert value.const_value is not None
            tensor = value.const_value
            node.replace_input_with(
                position, new_initializer(graph, f"{value.name}_{count}", tensor.numpy(), tensor.dtype)
            )


def _store_in_4_bits(graph: ir.Graph, dequantize: ir.Node) -> None:
    integers, point = constant(dequantize.inputs[0]), constant(dequantize.inputs[2])
    if integers is None or point is None or integers.dtype.itemsize != 1:
        return
    low, high = (-8, 7) if integers.dtype == np.int8 else (0, 15)
    values = np.concatenate([integers.reshape(-1), point.reshape(-1)])
    if values.min(initial=0) < low or values.max(initial=0) > high:
        return
    kind = ir.DataType.INT4 if integers.dtype == np.int8 else ir.DataType.UINT4
    for position, array in ((0, integers), (2, point)):
        name = f"{dequantize.inputs[position].name}_4_bits"
        dequantize.replace_input_with(position, new_initializer(graph, name, array.astype(kind.numpy()), kind))


def _shorten_names(graph: ir.Graph) -> None:
    """Name weights and biases after the node that reads them, and everything else by numbers: names of values are a
    large part of a small file."""
    values = list(graph.initializers.values())
    graph.initializers.clear()
    for number, value in enumerate(values):
        value.name = _weight_name(value) or f"c{number}"
        if value.name in graph.initializers:
            value.name = f"{value.name}_{number}"
        graph.register_initializer(value)
    count = 0
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"v{count}"
                count += 1


def _weight_name(value: ir.Value) -> str | None:
    """Name of an initializer that is the weight or the bias of a product; None for others."""
    (node, position), *_ = value.uses()
    if node.op_type == "DequantizeLinear" and position == 0:
        node, position = next(iter(node.outputs[0].uses()), (node, 0))
    kind = {1: "weight", 2: "bias"}.get(position) if node.op_type in ("Conv", "Gemm", "MatMul") else None
    return kind and f"{(node.name or '').rpartition('/')[0]}.{kind}"
