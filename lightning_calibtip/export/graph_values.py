"""Small steps on graphs of onnx_ir."""

from typing import Any

import onnx_ir as ir


def constant(value: ir.Value | None) -> Any:
    """Return the numbers of an initializer as an array; None for what is computed.

    Example:
        >>> constant(ir.Value(name="x")) is None
        True
    """
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def new_initializer(graph: ir.Graph, name: str, array: Any, kind: ir.DataType | None = None) -> ir.Value:
    """Register an initializer under a name that no other one has.

    Args:
        graph: Graph that gets it.
        name: Name, which is followed by a number if there is one of that name.
        array: Its numbers.
        kind: Type, where it is not that of the array (4-bit integers).

    Example:
        >>> import numpy as np
        >>> graph = ir.Graph([], [], nodes=[])
        >>> [new_initializer(graph, "scale", np.float32([1])).name for _ in range(2)]
        ['scale', 'scale_1']
    """
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}_{count}", count + 1
    tensor = ir.tensor(array, dtype=kind, name=unique)
    value = ir.Value(name=unique, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def new_node(name: str, op_type: str, inputs: list[Any], like: ir.Value, **attributes: object) -> ir.Node:
    """Make a node whose output has the type and the shape of another value.

    Args:
        name: Name of the node.
        op_type: Its operator.
        inputs: Its inputs.
        like: The other value.
        **attributes: Attributes of the operator.

    Example:
        >>> x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
        >>> new_node("act", "Relu", [x], x).outputs[0].shape
        Shape([2])
    """
    node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes), name=name)
    node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
    node.outputs[0].name = f"{name}_output"
    return node


def attribute_of(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return an attribute of a node, or the default where it has none.

    Example:
        >>> attribute_of(ir.Node("", "Gemm", []), "transB", 0)
        0
    """
    return node.attributes[name].value if name in node.attributes else default


def only_reader(value: ir.Value) -> Any:
    """Find the node that alone reads a value, which the model does not return; None if there is none.

    Example:
        >>> x = ir.Value(name="x")
        >>> node = ir.Node("", "Relu", [x])
        >>> only_reader(x) is node, only_reader(node.outputs[0]) is None
        (True, True)
    """
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None
