"""Layers that must agree on their width, observed in the model's structure or named by the user."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ..quantization.network import QuantizedNetwork
from ..quantization.structure import Operator, Structure, Value

_ADDS = {"add", "sub"}


def sharing_a_weight(network: QuantizedNetwork) -> list[list[str]]:
    """Layers tied to one weight, with the one that owns it."""
    groups: dict[str, list[str]] = {}
    for name, layer in network.layers.items():
        if layer.tied_to is not None:
            groups.setdefault(layer.tied_to.name, [layer.tied_to.name]).append(name)
    return list(groups.values())


def named_groups(network: QuantizedNetwork, groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """The layers that each of the user's groups, a list of names and patterns, stands for.

    Raises:
        ValueError: If a group is no list, or one of its entries matches no quantized layer.
    """
    found = []
    for group in groups:
        if isinstance(group, str):
            raise ValueError(
                f"groups must be lists of names or patterns, got {group!r}: write [[{group!r}, ...], ...]."
            )
        for pattern in group:
            if not any(fnmatchcase(name, pattern) for name in network.layers):
                raise ValueError(
                    f"groups: {pattern!r} matches no quantized layer; these are: {', '.join(network.layers)}."
                )
        found.append([name for name in network.layers if any(fnmatchcase(name, pattern) for pattern in group)])
    return found


def sharing_an_input(network: QuantizedNetwork) -> list[list[str]]:
    """Groups of layers that read the very same tensor."""
    assert network.structure is not None
    readers: dict[Value, list[str]] = defaultdict(list)
    for name in network.layers:
        for call in network.structure.calls_of.get(name, []):
            for value in call.reads[:1]:
                readers[value].append(name)
    return [list(dict.fromkeys(names)) for names in readers.values() if len(set(names)) > 1]


def feeding_an_add(network: QuantizedNetwork) -> list[list[str]]:
    """Groups of layers whose outputs are added up: directly, or after operators with a single tensor as their input
    (normalizations, activations, views) in between."""
    assert network.structure is not None
    groups = []
    for operator in network.structure.operators:
        if operator.name in _ADDS and not any(_layer_of(network, network.structure, operator)):
            sources = [_source(network, network.structure, value) for value in dict.fromkeys(operator.reads)]
            names = list(dict.fromkeys(name for name in sources if name))
            if len(names) > 1:
                groups.append(names)
    return groups


def _layer_of(network: QuantizedNetwork, structure: Structure, operator: Operator) -> list[str]:
    """The quantized layer that an operator belongs to, as a list of none or one."""
    return [name for index in operator.scope if (name := structure.calls[index].name) in network.layers][:1]


def _source(network: QuantizedNetwork, structure: Structure, value: Value) -> str | None:
    """The layer that a value comes from with no second tensor coming in on the way."""
    seen = set()
    while value not in seen:
        seen.add(value)
        writer = next((o for o in reversed(structure.writers.get(value.storage, [])) if _wrote(o, value)), None)
        if writer is None:
            return None
        if layer := _layer_of(network, structure, writer):
            return layer[0]
        inputs = [read for read in dict.fromkeys(writer.reads) if not structure.is_fixed(read)]
        if len(inputs) != 1:
            return None
        value = inputs[0]
    return None


def _wrote(operator: Operator, value: Value) -> bool:
    """Whether an operator made this state of a tensor, rather than a view of it."""
    reads, writes = ({(v.storage, v.version) for v in values} for values in (operator.reads, operator.writes))
    return (value.storage, value.version) in writes - reads
