"""Blocks of a model, found in its structure: modules in which paths fork and join again."""

from collections import defaultdict
from collections.abc import Callable

from .structure import ModuleCall, Operator, Structure, Value, is_fused_attention

_JOINS = {"add", "sub", "cat", "mul", "maximum", "bmm", "matmul", "baddbmm"}
_PRODUCTS = {"bmm", "matmul", "baddbmm"}


def find_blocks(structure: Structure, contains: Callable[[str], bool]) -> list[str]:
    """Find the deepest modules in which paths fork and join again (residual connections, attention).

    Attention is not left alone: the block is the layer of the transformer that it belongs to, with its residual
    connections, and with a second attention (to an encoder) where these go around both.

    Args:
        structure: As observed.
        contains: Whether the module of a name holds anything worth a block of its own.

    Returns:
        Names that do not contain each other, in the order of execution; never the whole model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> class Residual(nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> model = nn.Sequential(nn.Linear(2, 2), Residual(2, 2))
        >>> find_blocks(record(model, lambda: model(torch.ones(1, 2))), lambda name: True)
        ['1']
    """
    attentions = {name for operator in structure.operators if (name := _attention_of(structure, operator, contains))}
    owners = {
        name
        for operator in structure.operators
        if not any(structure.calls[index].name in attentions for index in operator.scope)
        and (name := _owner_of_join(structure, operator))
        and contains(name)
    }
    around = {_layer_around(name, owners, attentions) for name in attentions}
    layers = {name for name in around if not any(_is_below(name, other) for other in around)}
    deepest = {name for name in owners if not any(_is_below(other, name) for other in owners | layers)}
    deepest = {name for name in deepest if not any(name == layer or _is_below(name, layer) for layer in layers)}
    return sorted(layers | deepest, key=list(structure.calls_of).index)


def _attention_of(structure: Structure, operator: Operator, contains: Callable[[str], bool]) -> str | None:
    """Innermost module, with something inside, in which two computed tensors are multiplied; or None."""
    if operator.name not in _PRODUCTS and not is_fused_attention(operator):
        return None
    # Rotary embeddings may multiply positions by a view of a buffer.
    computed = [x for x in _computed_inputs(structure, operator) if not structure.is_view_of_fixed(x)]
    if len(computed) < 2:
        return None
    names = [structure.calls[index].name for index in reversed(operator.scope)]
    return next((name for name in names if name and contains(name)), None)


def _owner_of_join(structure: Structure, operator: Operator) -> str | None:
    """Innermost module inside which the inputs of a joining operator have a common ancestor."""
    if operator.name not in _JOINS and not is_fused_attention(operator):
        return None
    inputs = _computed_inputs(structure, operator)
    if len(inputs) < 2:
        return None
    for index in reversed(operator.scope):
        call = structure.calls[index]
        if call.name == "":
            return None
        ancestors = [_ancestors(structure, value, call) for value in inputs[:2]]
        if ancestors[0] & ancestors[1]:
            return call.name
    return None


def _computed_inputs(structure: Structure, operator: Operator) -> list[Value]:
    """Different values that an operator reads, without parameters and constants."""
    return [value for value in dict.fromkeys(operator.reads) if not structure.is_fixed(value)]


def _ancestors(structure: Structure, value: Value, call: ModuleCall) -> set[int]:
    """Storages that ``value`` was computed from, inside one call of a module (its own inputs included)."""
    found, waiting = {value.storage}, [value.storage]
    producers: dict[int, list[Operator]] = defaultdict(list)
    for operator in structure.operators[call.start : call.stop]:
        for written in operator.writes:
            producers[written.storage].append(operator)
    entered = {read.storage for read in call.reads}
    while waiting:
        storage = waiting.pop()
        if storage in entered:
            continue
        for operator in producers[storage]:
            for read in operator.reads:
                if read.storage not in found and not structure.is_fixed(read):
                    found.add(read.storage)
                    waiting.append(read.storage)
                elif read.storage in entered:
                    found.add(read.storage)
    return found


def _is_below(name: str, parent: str) -> bool:
    return name.startswith(f"{parent}.")


def _layer_around(attention: str, owners: set[str], attentions: set[str]) -> str:
    """The transformer's layer that an attention belongs to: the innermost of the ``owners`` around it, and from there
    outwards as long as no further attention comes in."""
    around = sorted((name for name in owners if name == attention or _is_below(attention, name)), key=len, reverse=True)
    if not around:
        return attention
    own = {name for name in attentions if name == around[0] or _is_below(name, around[0])}
    return [name for name in around if own == {a for a in attentions if a == name or _is_below(a, name)}][-1]
