"""Rewriting an exported graph into the forms that engines recognise as integers; no rewriting changes a result."""

import ast
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

# They change no value, only where it stands: quantizing before them or after them is the same.
_MOVES = {
    "Slice",
    "Pad",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "MaxPool",
    "Concat",
    "DepthToSpace",
}
_SCOPES = "pkg.torch.onnx.name_scopes"


def rewrite(model: ir.Model, layers: set[str], int4: bool) -> None:
    """Rewrite a graph in place.

    - Nodes are named after the layer whose ``forward`` computes them.
    - What is quantized after slices, paddings, reshapes, maxima and joins is quantized before them, too.
    - Activation functions before a quantizer become the limits of its integers.
    - Zero paddings become those of the convolution after them; means over an image become global pools.
    - Transposed weights are stored transposed; linear layers whose input has one unknown dimension become Gemm (ONNX
      Runtime makes float Gemm of them, before it looks for integers); biases of convolutions and of Gemm are integers on the grid of the
      products (scale of the input times scale of the weight).
    - No two nodes share an initializer, names of values are short, and no metadata is kept.

    Args:
        model: From ``torch.onnx.export`` of a ``deployable_copy``.
        layers: Names of the quantized layers.
        int4: Whether weights of at most 4 bits are stored in 4 bits, not 8.

    Example:
        See ``export_onnx``.
    """
    graph = model.graph
    _name_nodes(graph, layers)
    for quantize in _nodes(graph, "QuantizeLinear"):
        _quantize_before_moves(graph, quantize)
    for quantize in _nodes(graph, "QuantizeLinear"):
        _limit_integers(graph, quantize)
    for pad in _nodes(graph, "Pad"):
        _pad_in_convolution(graph, pad)
    for mean in _nodes(graph, "ReduceMean"):
        _pool_globally(graph, mean)
    for transpose in _nodes(graph, "Transpose"):
        _transpose_weight(graph, transpose)
    flattened: dict[ir.Value, ir.Value] = {}
    for product in _nodes(graph, "MatMul"):
        _flatten_product(graph, product, flattened)
    for product in [*_nodes(graph, "Conv"), *_nodes(graph, "Gemm")]:
        _integer_bias(graph, product)
    _separate_initializers(graph)
    if int4:
        for dequantize in _nodes(graph, "DequantizeLinear"):
            _store_in_4_bits(graph, dequantize)
    _drop_unused(graph)
    _shorten_names(graph)
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    graph.doc_string = model.doc_string = None


def _nodes(graph: ir.Graph, op_type: str) -> Iterator[ir.Node]:
    """Nodes of one type, of those that are in the graph at first."""
    return iter([node for node in graph if node.op_type == op_type])


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the numbers of an initializer; None for what is computed.

    Example:
        >>> constant(ir.Value(name="x")) is None
        True
    """
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _initializer(graph: ir.Graph, name: str, array: np.ndarray, kind: ir.DataType | None = None) -> ir.Value:
    """A new initializer of a unique name."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}_{count}", count + 1
    tensor = ir.tensor(array, dtype=kind, name=unique)
    value = ir.Value(name=unique, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(name: str, op_type: str, inputs: list[ir.Value | None], like: ir.Value, **attributes: object) -> ir.Node:
    """A node whose output has the type and the shape of another value."""
    node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes), name=name)
    node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
    node.outputs[0].name = f"{name}_output"
    return node


def _attribute(node: ir.Node, name: str, default: object = None) -> object:
    return node.attributes[name].value if name in node.attributes else default


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value, which the model does not return; None if there is none."""
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


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


def _quantize_before_moves(graph: ir.Graph, quantize: ir.Node) -> None:
    """Put a pair of the same quantizer before the moves that lie before it."""
    moves, roots = [], []
    waiting = [quantize.inputs[0]]
    while waiting:
        value = waiting.pop()
        producer = value.producer() if value is not None else None
        if (
            producer is None
            or producer.op_type not in _MOVES
            or (producer.op_type == "Pad" and not _pads_zero(producer))
        ):
            roots.append(value)
        elif not all(_reads_alike(reader, quantize, {*moves, producer}) for reader, _ in producer.outputs[0].uses()):
            return
        elif producer.outputs[0].is_graph_output():
            return
        else:
            moves.append(producer)
            waiting += producer.inputs if producer.op_type == "Concat" else producer.inputs[:1]
    if not moves or any(root is None or root.producer() is None for root in roots):
        return
    dequantize = quantize.outputs[0].uses()[0][0]
    clip = None
    if dequantize.op_type == "Clip":
        clip, dequantize = dequantize, dequantize.outputs[0].uses()[0][0]
    for root in dict.fromkeys(roots):
        if root.producer().op_type == "DequantizeLinear" and root.producer().inputs[1] is quantize.inputs[1]:
            continue
        pair = _same_pair(root, quantize)
        if pair is None:
            name = f"{quantize.name}_before_{moves[-1].op_type}_{root.name}"
            first = _node(name, "QuantizeLinear", [root, *quantize.inputs[1:]], quantize.outputs[0])
            made = [first]
            if clip is not None:
                made.append(_node(f"{name}_clip", "Clip", [first.outputs[0], *clip.inputs[1:]], clip.outputs[0]))
            inputs = [made[-1].outputs[0], *dequantize.inputs[1:]]
            made.append(_node(f"{name}_again", "DequantizeLinear", inputs, root))
            for node in made:
                if node.op_type != "DequantizeLinear":
                    node.outputs[0].shape = root.shape
            graph.insert_after(root.producer(), made)
            pair = made[-1].outputs[0]
        for move in moves:
            for position, value in enumerate(move.inputs):
                if value is root:
                    move.replace_input_with(position, pair)


def _reads_alike(reader: ir.Node, quantize: ir.Node, moves: set[ir.Node]) -> bool:
    """Whether a node reads a value as the quantizer does, or passes it on to there."""
    return reader in moves or (
        reader.op_type == "QuantizeLinear" and list(reader.inputs[1:]) == list(quantize.inputs[1:])
    )


def _same_pair(root: ir.Value, quantize: ir.Node) -> ir.Value | None:
    """What a pair of the same quantizer makes of a value, where there is such a pair."""
    for reader, _ in root.uses():
        if _reads_alike(reader, quantize, set()):
            follower = reader.outputs[0].uses()[0][0]
            if follower.op_type == "Clip":
                follower = follower.outputs[0].uses()[0][0]
            return follower.outputs[0]
    return None


def _pads_zero(pad: ir.Node) -> bool:
    fill = constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else np.zeros(())
    return _attribute(pad, "mode", "constant") == "constant" and fill is not None and not fill.any()


def _limit_integers(graph: ir.Graph, quantize: ir.Node) -> None:
    """Let integers saturate where the activation function before the quantizer does."""
    activation = quantize.inputs[0].producer()
    if activation is None or activation.op_type not in ("Relu", "Clip"):
        return
    if _only_reader(activation.outputs[0]) is not quantize:
        return
    scale, point = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    ends = (
        [np.float32(0), None] if activation.op_type == "Relu" else [*map(constant, activation.inputs[1:3]), None, None]
    )
    if scale is None or point is None or scale.size != 1:
        return
    if activation.op_type == "Clip" and any(
        value is not None and constant(value) is None for value in activation.inputs[1:3]
    ):
        return
    follower = quantize.outputs[0].uses()[0][0]
    clip = follower if follower.op_type == "Clip" else None
    limits = np.iinfo(point.dtype)
    low, high = limits.min, limits.max
    if clip is not None:
        low, high = (int(constant(value)) for value in clip.inputs[1:3])
    codes = [
        None if end is None else int(np.rint(np.float32(end) / scale.reshape(())) + int(point)) for end in ends[:2]
    ]
    new_low = low if codes[0] is None else min(max(low, codes[0]), high)
    new_high = high if codes[1] is None else max(min(high, codes[1]), new_low)
    quantize.replace_input_with(0, activation.inputs[0])
    graph.remove(activation, safe=True)
    if (new_low, new_high) == (low, high):
        return
    ends = [np.array(end, dtype=point.dtype) for end in (new_low, new_high)]
    limits_of = [
        _initializer(graph, f"{quantize.name}_{side}", end) for side, end in zip(("min", "max"), ends, strict=True)
    ]
    if clip is None:
        readers = list(quantize.outputs[0].uses())
        clip = _node(f"{quantize.name}_limits", "Clip", [quantize.outputs[0], *limits_of], quantize.outputs[0])
        graph.insert_after(quantize, clip)
        for reader, position in readers:
            reader.replace_input_with(position, clip.outputs[0])
    else:
        for position, value in enumerate(limits_of, start=1):
            clip.replace_input_with(position, value)


def _pad_in_convolution(graph: ir.Graph, pad: ir.Node) -> None:
    """Make a zero padding of an image that of the convolution after it."""
    amounts = constant(pad.inputs[1])
    if not _pads_zero(pad) or amounts is None or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return
    half = len(amounts) // 2
    before, after = amounts[:half], amounts[half:]
    if half < 3 or amounts.min() < 0 or before[:2].any() or after[:2].any():
        return
    chain = [pad]
    while (reader := _only_reader(chain[-1].outputs[0])) is not None and reader.op_type in (
        "QuantizeLinear", "Clip", "DequantizeLinear",
    ):  # fmt: skip
        chain.append(reader)
    source = pad.inputs[0].producer()
    conv = _only_reader(chain[-1].outputs[0])
    if conv is None or conv.op_type != "Conv" or conv.inputs[0] is not chain[-1].outputs[0]:
        return
    if len(chain) > 1:
        # The same quantizer has come before the padding; else the convolution would read floats.
        quantized = source is not None and source.op_type == "DequantizeLinear"
        if not quantized or source.inputs[1] is not chain[-1].inputs[1]:
            return
    if _attribute(conv, "auto_pad", "NOTSET") != "NOTSET":
        return
    pads = list(_attribute(conv, "pads", [0] * (2 * (half - 2))))  # type: ignore[call-overload]
    added = [*map(int, before[2:]), *map(int, after[2:])]
    conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(pads, added, strict=True)])
    conv.replace_input_with(0, pad.inputs[0])
    for node in reversed(chain):
        graph.remove(node, safe=True)


def _pool_globally(graph: ir.Graph, mean: ir.Node) -> None:
    """Make a mean over both dimensions of an image a global pool."""
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    shape = mean.inputs[0].shape
    if axes is None or shape is None or len(shape) != 4 or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        return
    pool = _node(f"{mean.name}_pool", "GlobalAveragePool", [mean.inputs[0]], mean.inputs[0])
    pool.outputs[0].shape = ir.Shape([*shape[:2], 1, 1])
    made = [pool]
    if not _attribute(mean, "keepdims", 1):
        squeezed = _initializer(graph, f"{mean.name}_axes", np.array([2, 3], dtype=np.int64))
        made.append(_node(f"{mean.name}_squeeze", "Squeeze", [pool.outputs[0], squeezed], mean.outputs[0]))
    graph.insert_after(mean, made)
    mean.outputs[0].replace_all_uses_with(made[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(mean, safe=True)


def _transpose_weight(graph: ir.Graph, transpose: ir.Node) -> None:
    """Store integers transposed, where their dequantized values are."""
    dequantize = transpose.inputs[0].producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or "block_size" in dequantize.attributes:
        return
    integers = constant(dequantize.inputs[0])
    if integers is None or _only_reader(dequantize.outputs[0]) is not transpose:
        return
    order = list(_attribute(transpose, "perm"))  # type: ignore[call-overload]
    stored = _initializer(
        graph, f"{dequantize.inputs[0].name}_transposed", np.ascontiguousarray(integers.transpose(order))
    )
    dequantize.replace_input_with(0, stored)
    dequantize.outputs[0].shape = transpose.outputs[0].shape
    if "axis" in dequantize.attributes:
        axis = int(_attribute(dequantize, "axis")) % integers.ndim  # type: ignore[call-overload]
        dequantize.attributes["axis"] = ir.AttrInt64("axis", order.index(axis))
    transpose.outputs[0].replace_all_uses_with(dequantize.outputs[0])
    graph.remove(transpose, safe=True)


def _flatten_product(graph: ir.Graph, product: ir.Node, flattened: dict[ir.Value, ir.Value]) -> None:
    """Make a product with a weight and a bias after it a Gemm, where the shapes are known but for one dimension.

    Args:
        graph: The graph.
        product: A MatMul.
        flattened: Dequantized inputs of earlier products, as matrices.
    """
    again, weight = (value.producer() for value in product.inputs[:2])
    add = _only_reader(product.outputs[0])
    shape = product.inputs[0].shape
    if any(node is None or node.op_type != "DequantizeLinear" for node in (again, weight)) or add is None:
        return
    quantize = again.inputs[0].producer()
    bias = next((value for value in add.inputs if value is not product.outputs[0]), None)
    numbers, integers = constant(bias), constant(weight.inputs[0])
    if add.op_type != "Add" or numbers is None or numbers.ndim != 1 or integers is None or integers.ndim != 2:
        return
    unknown = shape is None or sum(not isinstance(length, int) for length in shape) > 1
    if unknown or len(shape) < 3 or quantize is None or quantize.op_type != "QuantizeLinear":
        return
    if product.inputs[0] not in flattened:
        rows = _initializer(graph, f"{product.name}_rows", np.array([-1, integers.shape[0]], dtype=np.int64))
        matrix = _node(f"{product.name}_rows", "Reshape", [quantize.inputs[0], rows], quantize.inputs[0])
        first = _node(
            f"{product.name}_quantize", "QuantizeLinear", [matrix.outputs[0], *quantize.inputs[1:]], quantize.outputs[0]
        )
        second = _node(
            f"{product.name}_dequantize", "DequantizeLinear", [first.outputs[0], *again.inputs[1:]], again.outputs[0]
        )
        for node in (matrix, first, second):
            node.outputs[0].shape = None
        graph.insert_before(quantize, [matrix, first, second])
        flattened[product.inputs[0]] = second.outputs[0]
    gemm = _node(
        product.name or "Gemm", "Gemm", [flattened[product.inputs[0]], product.inputs[1], bias], add.outputs[0]
    )
    gemm.outputs[0].shape = None
    lengths = [length if isinstance(length, int) else -1 for length in shape[:-1]]
    full = _initializer(graph, f"{product.name}_shape", np.array([*lengths, integers.shape[1]], dtype=np.int64))
    restored = _node(f"{product.name}_restored", "Reshape", [gemm.outputs[0], full], add.outputs[0])
    graph.insert_after(add, [gemm, restored])
    add.outputs[0].replace_all_uses_with(restored.outputs[0], replace_graph_outputs=True)
    graph.remove([add, product], safe=True)


def _integer_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Store the bias of a product of integers as int32, at the scale of the products."""
    if len(product.inputs) < 3 or product.inputs[2] is None:
        return
    sources = [value.producer() if value is not None else None for value in product.inputs[:2]]
    if any(
        source is None or source.op_type != "DequantizeLinear" or "block_size" in source.attributes
        for source in sources
    ):
        return
    bias = constant(product.inputs[2])
    input_scale, weight_scale = (constant(source.inputs[1]) for source in sources)
    if bias is None or bias.ndim != 1 or input_scale is None or weight_scale is None or input_scale.size != 1:
        return
    if any(_attribute(product, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return
    scale = (input_scale.astype(np.float32).reshape(()) * weight_scale.astype(np.float32)).reshape(-1)
    integers = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    if np.abs(integers).max(initial=0) >= 2**31:
        return
    if scale.size == 1:
        scale, attributes = scale.reshape(()), {}
    else:
        attributes = {"axis": 0}
    name = product.inputs[2].name
    stored = [
        _initializer(graph, f"{name}_integers", integers.astype(np.int32)),
        _initializer(graph, f"{name}_scale", scale),
        _initializer(graph, f"{name}_zero_point", np.zeros(scale.shape, dtype=np.int32)),
    ]
    node = _node(f"{product.name}_bias", "DequantizeLinear", stored, product.inputs[2], **attributes)
    graph.insert_before(product, node)
    product.replace_input_with(2, node.outputs[0])


def _separate_initializers(graph: ir.Graph) -> None:
    """Give each reader an initializer of its own: engines' passes change the one of a reader for all others."""
    for value in list(graph.initializers.values()):
        for count, (node, position) in enumerate(list(value.uses())[1:], start=1):
            assert value.const_value is not None
            tensor = value.const_value
            node.replace_input_with(
                position, _initializer(graph, f"{value.name}_{count}", tensor.numpy(), tensor.dtype)
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
        dequantize.replace_input_with(position, _initializer(graph, name, array.astype(kind.numpy()), kind))


def _drop_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


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


def weight_bytes(model: ir.Model) -> int:
    """Count the bytes of all initializers, 4-bit ones as half a byte.

    Example:
        >>> weight_bytes(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10))
        0
    """
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    return sum(math.ceil(tensor.nbytes) for tensor in tensors)
