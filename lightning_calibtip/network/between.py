"""What an engine needs on the grid of a quantizer between layers: which additions and pools can be integers, which
tensors have one grid, which outputs of convolutions no quantizer reads."""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .structure import Operator, Structure, Value

# What these compute of integers, they compute of the numbers that the integers stand for: whatever is quantized before
# them may as well be quantized after them. Views do so, too.
_MOVES = {
    "constant_pad_nd", "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "clone", "copy", "unsafe_view",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "upsample_nearest2d", "upsample_nearest_exact2d",
    "reflection_pad2d", "replication_pad2d", "repeat", "flip", "roll", "index_select",
}  # fmt: skip
_JOINS = {"cat", "stack"}
# Engines compute these while they quantize.
_CLAMPS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "threshold"}


@dataclass
class Destinations:
    """Who reads a tensor in the end.

    Args:
        operands: Layers, and which of their operands it is, that quantize it.
        others: Names of the operators that read it in float.
    """

    operands: set[tuple[str, int]] = field(default_factory=set)
    others: list[str] = field(default_factory=list)


def grid_root(structure: Structure, value: Value) -> Value:
    """Follow a tensor back to the one that it is a slice, view, padding or maximum of.

    A quantizer of the one gives the same numbers as if it were applied to the other.

    Args:
        structure: As observed.
        value: The tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Flatten(), nn.Linear(2, 2))
        >>> structure = record(model, lambda: model(torch.ones(1, 2)))
        >>> grid_root(structure, structure.calls_of["2"][0].reads[0]) == structure.calls_of["0"][0].writes[0]
        True
    """
    seen = set()
    while value not in seen:
        seen.add(value)
        for operator in structure.writers.get(value.storage, ()):
            reads = [read for read in dict.fromkeys(operator.reads) if not structure.is_fixed(read)]
            if value in operator.writes and value not in reads and len(reads) == 1 and moves_values(operator):
                value = reads[0]
                break
    return value


def moves_values(operator: Operator) -> bool:
    """Whether an operator changes no value, but only where it stands (or leaves some out, or adds zeros).

    Example:
        >>> moves_values(Operator("pixel_shuffle", (), (), (), None))
        True
    """
    if operator.name in _MOVES:
        return True
    states = {(read.storage, read.version) for read in operator.reads}
    return bool(operator.writes) and all((write.storage, write.version) in states for write in operator.writes)


def destinations(
    structure: Structure, values: Iterable[Value], operands: Mapping[str, int], folds: Mapping[str, str]
) -> Destinations:
    """Find out who reads tensors in the end: through views, paddings, joins and clamps.

    Args:
        structure: As observed of the float model.
        values: The tensors.
        operands: Number of quantized inputs of each layer, by its full name.
        folds: Layers by the BatchNorms that are folded into them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Sigmoid())
        >>> structure = record(model, lambda: model(torch.ones(1, 2)))
        >>> destinations(structure, structure.calls_of["0"][0].writes, {"0": 1, "2": 1}, {}).operands
        {('2', 0)}
        >>> destinations(structure, structure.calls_of["2"][0].writes, {"0": 1, "2": 1}, {}).others
        ['sigmoid']
    """
    found = Destinations()
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if structure.is_returned(value):
            found.others.append("the model's output")
        for operator in structure.readers.get(value.storage, ()):
            if value not in operator.reads:
                continue
            calls = [structure.calls[index] for index in operator.scope]
            layer = next((call for call in calls if call.name in operands), None)
            norm = next((call for call in calls if call.name in folds), None)
            if layer is not None and (value in layer.operands or value in layer.reads):
                positions = [i for i, read in enumerate(layer.operands[: operands[layer.name]]) if read == value]
                found.operands.update((layer.name, position) for position in positions)
                if not positions:
                    found.others.append(operator.name)
            elif layer is not None:
                # What a layer computes inside from what was written before it began; its own output comes later.
                continue
            elif norm is not None and calls[-1] is norm:
                # What modules inside of it compute comes after the normalization.
                waiting += operator.writes[:1]
            elif moves_values(operator) or operator.name in _JOINS or operator.name in _CLAMPS:
                waiting += operator.writes
            else:
                found.others.append(operator.name)
    return found


def integer_operations(
    structure: Structure, operations: Collection[str], operands: Mapping[str, int], folds: Mapping[str, str]
) -> list[str]:
    """Choose the additions and pools whose result is read by quantizers alone: an engine computes these in integers.

    Args:
        structure: As observed, with the operations as modules.
        operations: Names of their modules.
        operands: Number of quantized inputs of each layer, and of each operation, by its name.
        folds: Layers by the BatchNorms that are folded into them.

    Returns:
        The names, in the order of ``operations``.

    Example:
        See ``plan``, which calls it.
    """
    chosen = [name for name in operations if name in structure.calls_of]
    while True:
        kept = {name: count for name, count in operands.items() if name not in operations or name in chosen}
        remaining = []
        for name in chosen:
            written = [value for call in structure.calls_of[name] for value in call.writes]
            if not destinations(structure, written, kept, folds).others:
                remaining.append(name)
        if remaining == chosen:
            return chosen
        chosen = remaining


def unquantized_outputs(
    structure: Structure,
    layers: Iterable[str],
    operands: Mapping[str, int],
    folds: Mapping[str, str],
    grids: Mapping[str, Sequence[Hashable]],
) -> list[str]:
    """Choose the layers whose output is not what exactly one quantizer reads: an engine that writes integers needs one
    for it.

    Args:
        structure: As observed of the float model.
        layers: Names of the layers to choose from.
        operands: Number of quantized inputs of each layer, by its full name.
        folds: Layers by the BatchNorms that are folded into them.
        grids: What tells the quantizers of each layer's operands apart.

    Returns:
        Those of the names ``layers``.

    Example:
        See ``plan``, which calls it.
    """
    followers = {layer: norm for norm, layer in folds.items()}
    chosen = []
    for name in layers:
        calls = structure.calls_of.get(followers.get(name, name), ())
        found = destinations(structure, [value for call in calls for value in call.writes], operands, folds)
        if found.others or len({grids[layer][position] for layer, position in found.operands}) > 1:
            chosen.append(name)
    return chosen
