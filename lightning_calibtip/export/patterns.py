"""The forms of a graph that engines recognise as integers; none of the rewritings changes a result."""

from typing import Any

import numpy as np
import onnx_ir as ir

from .graph_values import attribute_of, constant, new_initializer, new_node, only_reader

# They change no value, only where it stands: quantizing before them or after them is the same.
_MOVES = {
    "Slice", "Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Concat", "DepthToSpace",
    "Expand", "Tile", "Gather", "Resize",
}  # fmt: skip


def quantize_before_moves(graph: ir.Graph, quantize: ir.Node) -> None:
    """Put a pair of the same quantizer before the moves that lie before it. See ``rewrite``."""
    moves: list[ir.Node] = []
    roots: list[Any] = []
    waiting = [quantize.inputs[0]]
    while waiting:
        value = waiting.pop()
        producer = value.producer() if value is not None else None
        if producer is None or not _moves_values(producer):
            roots.append(value)
            continue
        readers = [reader for reader, _ in producer.outputs[0].uses()]
        if producer.outputs[0].is_graph_output() or not all(
            _reads_alike(reader, quantize, {*moves, producer}) for reader in readers
        ):
            return
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
            first = new_node(name, "QuantizeLinear", [root, *quantize.inputs[1:]], quantize.outputs[0])
            made = [first]
            if clip is not None:
                made.append(new_node(f"{name}_clip", "Clip", [first.outputs[0], *clip.inputs[1:]], clip.outputs[0]))
            inputs = [made[-1].outputs[0], *dequantize.inputs[1:]]
            made.append(new_node(f"{name}_again", "DequantizeLinear", inputs, root))
            for node in made:
                if node.op_type != "DequantizeLinear":
                    node.outputs[0].shape = root.shape
            graph.insert_after(root.producer(), made)
            pair = made[-1].outputs[0]
        for move in moves:
            for position, value in enumerate(move.inputs):
                if value is root:
                    move.replace_input_with(position, pair)


def _moves_values(node: ir.Node) -> bool:
    if node.op_type == "Resize":
        return attribute_of(node, "mode", "nearest") == "nearest"
    if node.op_type == "Pad":
        return _pads_zero(node) or attribute_of(node, "mode", "constant") in ("reflect", "edge")
    return node.op_type in _MOVES


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
    return attribute_of(pad, "mode", "constant") == "constant" and fill is not None and not fill.any()


def limit_integers(graph: ir.Graph, quantize: ir.Node) -> None:
    """Let integers saturate where the activation functions before the quantizer do. See ``rewrite``."""
    while _limit_integers(graph, quantize):
        pass


def _ends(activation: ir.Node) -> list[np.ndarray | None] | None:
    """Least and greatest output of an activation function, None where it has no end; None if it is another one, or if
    no number is its end."""
    if activation.op_type == "Relu":
        return [np.zeros((), np.float32), None]
    given: list[ir.Value | None] = []
    if activation.op_type == "Clip":
        given = [*activation.inputs[1:3], None, None][:2]
    elif activation.op_type in ("Min", "Max") and len(activation.inputs) == 2:
        end = activation.inputs[1]
        given = [None, end] if activation.op_type == "Min" else [end, None]
    ends = [constant(value) for value in given]
    scalars = all(
        value is None or (end is not None and end.shape in ((), (1,)) and not np.isnan(end).any())
        for value, end in zip(given, ends, strict=True)
    )
    return ends if given and scalars else None


def _code(end: np.ndarray, scale: np.ndarray, point: np.ndarray) -> int:
    """Integer of an end, which may lie far outside of those that the type has, or be infinite."""
    limits = np.iinfo(point.dtype)
    with np.errstate(over="ignore"):
        code = np.rint(np.float32(end.reshape(())) / scale.reshape(())) + int(point)
    return int(np.clip(code, limits.min, limits.max))


def _limit_integers(graph: ir.Graph, quantize: ir.Node) -> bool:
    """Whether an activation function before the quantizer has become the limits of its integers."""
    activation = quantize.inputs[0].producer()
    ends = None if activation is None else _ends(activation)
    if activation is None or ends is None or only_reader(activation.outputs[0]) is not quantize:
        return False
    scale, point = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    if scale is None or point is None or scale.size != 1:
        return False
    follower = quantize.outputs[0].uses()[0][0]
    clip: Any = follower if follower.op_type == "Clip" else None
    limits = np.iinfo(point.dtype)
    low, high = (limits.min, limits.max) if clip is None else (int(constant(value)) for value in clip.inputs[1:3])
    codes = [None if end is None else _code(end, scale, point) for end in ends]
    if codes[0] is not None and codes[1] is not None:
        # The greatest output wins where it is below the least.
        codes[0] = min(codes[0], codes[1])
    new_low = low if codes[0] is None else min(max(low, codes[0]), high)
    new_high = high if codes[1] is None else max(min(high, codes[1]), new_low)
    quantize.replace_input_with(0, activation.inputs[0])
    graph.remove(activation, safe=True)
    if (new_low, new_high) == (low, high):
        return True
    limits_of = [
        new_initializer(graph, f"{quantize.name}_{side}", np.array(code, dtype=point.dtype))
        for side, code in (("min", new_low), ("max", new_high))
    ]
    if clip is None:
        readers = list(quantize.outputs[0].uses())
        clip = new_node(f"{quantize.name}_limits", "Clip", [quantize.outputs[0], *limits_of], quantize.outputs[0])
        graph.insert_after(quantize, clip)
        for reader, position in readers:
            reader.replace_input_with(position, clip.outputs[0])
    else:
        for position, value in enumerate(limits_of, start=1):
            clip.replace_input_with(position, value)
    return True


def pad_in_convolution(graph: ir.Graph, pad: ir.Node) -> None:
    """Make a zero padding of an image that of the convolution after it. See ``rewrite``."""
    amounts = constant(pad.inputs[1])
    if not _pads_zero(pad) or amounts is None or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return
    half = len(amounts) // 2
    before, after = amounts[:half], amounts[half:]
    if half < 3 or amounts.min() < 0 or before[:2].any() or after[:2].any():
        return
    chain = [pad]
    while (reader := only_reader(chain[-1].outputs[0])) is not None and reader.op_type in (
        "QuantizeLinear", "Clip", "DequantizeLinear",
    ):  # fmt: skip
        chain.append(reader)
    source = pad.inputs[0].producer()
    conv = only_reader(chain[-1].outputs[0])
    if conv is None or conv.op_type != "Conv" or conv.inputs[0] is not chain[-1].outputs[0]:
        return
    if len(chain) > 1:
        # The same quantizer has come before the padding; else the convolution would read floats.
        quantized = source is not None and source.op_type == "DequantizeLinear"
        if not quantized or source.inputs[1] is not chain[-1].inputs[1]:
            return
    if attribute_of(conv, "auto_pad", "NOTSET") != "NOTSET":
        return
    pads = list(attribute_of(conv, "pads", [0] * (2 * (half - 2))))
    added = [*map(int, before[2:]), *map(int, after[2:])]
    conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(pads, added, strict=True)])
    conv.replace_input_with(0, pad.inputs[0])
    for node in reversed(chain):
        graph.remove(node, safe=True)


def pool_globally(graph: ir.Graph, mean: ir.Node) -> None:
    """Make a mean over both dimensions of an image a global pool. See ``rewrite``."""
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    shape = mean.inputs[0].shape
    if axes is None or shape is None or len(shape) != 4 or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        return
    pool = new_node(f"{mean.name}_pool", "GlobalAveragePool", [mean.inputs[0]], mean.inputs[0])
    pool.outputs[0].shape = ir.Shape([*shape[:2], 1, 1])
    made = [pool]
    if not attribute_of(mean, "keepdims", 1):
        squeezed = new_initializer(graph, f"{mean.name}_axes", np.array([2, 3], dtype=np.int64))
        made.append(new_node(f"{mean.name}_squeeze", "Squeeze", [pool.outputs[0], squeezed], mean.outputs[0]))
    graph.insert_after(mean, made)
    mean.outputs[0].replace_all_uses_with(made[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(mean, safe=True)


def transpose_weight(graph: ir.Graph, transpose: ir.Node) -> None:
    """Store integers transposed, where their dequantized values are. See ``rewrite``."""
    dequantize = transpose.inputs[0].producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or "block_size" in dequantize.attributes:
        return
    integers = constant(dequantize.inputs[0])
    if integers is None or only_reader(dequantize.outputs[0]) is not transpose:
        return
    order = list(attribute_of(transpose, "perm"))
    stored = new_initializer(
        graph, f"{dequantize.inputs[0].name}_transposed", np.ascontiguousarray(integers.transpose(order))
    )
    dequantize.replace_input_with(0, stored)
    dequantize.outputs[0].shape = transpose.outputs[0].shape
    if "axis" in dequantize.attributes:
        axis = int(attribute_of(dequantize, "axis")) % integers.ndim
        dequantize.attributes["axis"] = ir.AttrInt64("axis", order.index(axis))
    transpose.outputs[0].replace_all_uses_with(dequantize.outputs[0])
    graph.remove(transpose, safe=True)


def flatten_product(graph: ir.Graph, product: ir.Node, flattened: dict[ir.Value, ir.Value]) -> None:
    """Make a product with a weight and a bias after it a Gemm, where the shapes are known but for one dimension. See
    ``rewrite``.

    Args:
        graph: The graph.
        product: A MatMul.
        flattened: Dequantized inputs of earlier products, as matrices.
    """
    sources: list[Any] = [value.producer() if value is not None else None for value in product.inputs[:2]]
    again, weight = sources
    add = only_reader(product.outputs[0])
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
        rows = new_initializer(graph, f"{product.name}_rows", np.array([-1, integers.shape[0]], dtype=np.int64))
        matrix = new_node(f"{product.name}_rows", "Reshape", [quantize.inputs[0], rows], quantize.inputs[0])
        first = new_node(
            f"{product.name}_quantize", "QuantizeLinear", [matrix.outputs[0], *quantize.inputs[1:]], quantize.outputs[0]
        )
        second = new_node(
            f"{product.name}_dequantize", "DequantizeLinear", [first.outputs[0], *again.inputs[1:]], again.outputs[0]
        )
        for node in (matrix, first, second):
            node.outputs[0].shape = None
        graph.insert_before(quantize, [matrix, first, second])
        flattened[product.inputs[0]] = second.outputs[0]
    gemm = new_node(
        product.name or "Gemm", "Gemm", [flattened[product.inputs[0]], product.inputs[1], bias], add.outputs[0]
    )
    gemm.outputs[0].shape = None
    lengths = [length if isinstance(length, int) else -1 for length in shape[:-1]]
    full = new_initializer(graph, f"{product.name}_shape", np.array([*lengths, integers.shape[1]], dtype=np.int64))
    restored = new_node(f"{product.name}_restored", "Reshape", [gemm.outputs[0], full], add.outputs[0])
    graph.insert_after(add, [gemm, restored])
    add.outputs[0].replace_all_uses_with(restored.outputs[0], replace_graph_outputs=True)
    graph.remove([add, product], safe=True)


def integer_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Store the bias of a product of integers as int32, at the scale of the products, if it is a whole number of its
    steps. See ``rewrite``."""
    if len(product.inputs) < 3 or product.inputs[2] is None:
        return
    sources: list[Any] = [value.producer() if value is not None else None for value in product.inputs[:2]]
    if any(
        source is None or source.op_type != "DequantizeLinear" or "block_size" in source.attributes
        for source in sources
    ):
        return
    bias = constant(product.inputs[2])
    input_scale, weight_scale = (constant(source.inputs[1]) for source in sources)
    if bias is None or bias.ndim != 1 or input_scale is None or weight_scale is None or input_scale.size != 1:
        return
    if any(attribute_of(product, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return
    scale = (input_scale.astype(np.float32).reshape(()) * weight_scale.astype(np.float32)).reshape(-1)
    steps = bias.astype(np.float64) / scale.astype(np.float64)
    integers = np.rint(steps)
    # A product of float32 numbers is exact to half a unit of the 24th bit.
    off_grid = np.abs(steps - integers) > 1e-3 + 2.0**-22 * np.abs(integers)
    if off_grid.any() or np.abs(integers).max(initial=0) >= 2**31:
        return
    attributes = {} if scale.size == 1 else {"axis": 0}
    scale = scale.reshape(()) if scale.size == 1 else scale
    name = product.inputs[2].name
    stored = [
        new_initializer(graph, f"{name}_integers", integers.astype(np.int32)),
        new_initializer(graph, f"{name}_scale", scale),
        new_initializer(graph, f"{name}_zero_point", np.zeros(scale.shape, dtype=np.int32)),
    ]
    node = new_node(f"{product.name}_bias", "DequantizeLinear", stored, product.inputs[2], **attributes)
    graph.insert_before(product, node)
    product.replace_input_with(2, node.outputs[0])
