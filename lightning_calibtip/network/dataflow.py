"""Where values of a model come from and go to: walks over its observed structure."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from .structure import Operator, Structure, Value

_ADDS = {"add", "sub"}

# Operators that choose rows by indices or a mask, their second operand and those after it, and that put rows back.
_CHOOSES = {"index", "index_select", "gather", "take", "take_along_dim", "masked_select"}
_PUTS = {"index_add", "index_put", "index_copy", "scatter", "scatter_add", "scatter_reduce", "masked_scatter"}


def is_closed(structure: Structure, name: str) -> bool:
    """Whether a module is called once, what it computes leaves it by its return value alone, and it changes nothing
    that it is given.

    The stored output of such a module can stand in for it.

    Args:
        structure: As observed.
        name: Full name of the module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
        >>> structure = record(model, lambda: model(torch.ones(1, 2)))
        >>> is_closed(structure, "0"), is_closed(structure, "1")
        (True, False)
    """
    calls = structure.calls_of.get(name, [])
    if len(calls) != 1:
        return False
    call = calls[0]
    returned = {value.storage for value in call.writes}
    inside = structure.operators[call.start : call.stop]
    made = {value.storage for operator in inside for value in operator.writes}
    if made & {value.storage for value in call.reads}:
        return False
    read_outside = {
        read.storage
        for operator in (*structure.operators[: call.start], *structure.operators[call.stop :])
        for read in operator.reads
    }
    return not (made - returned) & read_outside


def live_modules(structure: Structure, stored: Collection[str], pending: Sequence[str], to_end: bool) -> set[str]:
    """Find the modules whose stored outputs something to come still depends on, by a walk backwards over the operators.

    What decides over shapes on the way, such as a mask of samples, is depended on as well: stored outputs would not fit
    other shapes.

    Args:
        structure: As observed.
        stored: Names of the modules that answer with stored outputs instead of computing; each is called once.
        pending: Names of the modules that will be run; those inside a stored one do not count.
        to_end: Whether the model's own output will be asked for, too.

    Returns:
        Those of the names ``stored``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> structure = record(model, lambda: model(torch.ones(1, 2)))
        >>> live_modules(structure, ["0", "1"], ["2"], to_end=False)
        {'1'}
    """
    stored_calls = {structure.calls_of[name][0].index: name for name in stored}
    waiting = output_storages(structure) if to_end else []
    end = len(structure.operators) if to_end else 0
    for name in pending:
        if any(_is_inside(name, other) for other in stored):
            continue
        for call in structure.calls_of[name]:
            end = max(end, call.stop)
            waiting += [value.storage for value in call.reads]
            for operator in structure.operators[call.start : call.stop]:
                waiting += [value.storage for value in operator.reads]
    for operator in structure.operators[:end]:
        if not any(index in stored_calls for index in operator.scope):
            waiting += [value.storage for value in operator.decisive]
    live: set[str] = set()
    seen: set[int] = set()
    while waiting:
        storage = waiting.pop()
        if storage in seen:
            continue
        seen.add(storage)
        for name in stored:
            if any(value.storage == storage for value in structure.calls_of[name][0].writes):
                live.add(name)
        for operator in structure.writers.get(storage, []):
            inside = next((stored_calls[index] for index in operator.scope if index in stored_calls), None)
            if inside is not None:
                live.add(inside)
            else:
                waiting += [value.storage for value in operator.reads]
    return live


def reads_chosen_samples(structure: Structure, name: str, deciding: Collection[str]) -> bool:
    """Whether what some modules compute decides which samples a module is given, as a router does for experts.

    Args:
        structure: As observed.
        name: Full name of the module.
        deciding: Full names of those that may decide.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> class Best(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.score, self.expert, self.last = nn.Linear(2, 1), nn.Linear(2, 2), nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         best = self.score(x)[:, 0].topk(2).indices
        ...         return self.last(x.index_add(0, best, self.expert(x[best])))
        >>> structure = record(model := Best(), lambda: model(torch.randn(4, 2)))
        >>> [reads_chosen_samples(structure, name, ["score"]) for name in ("score", "expert", "last")]
        [False, True, False]
    """
    reads = [value for call in structure.calls_of.get(name, []) for value in call.reads]
    return any(
        _layer_of(structure, deciding_operator, deciding) is not None
        # What is put into a tensor does not change which samples its rows belong to.
        for operator in _behind(structure, reads, _read_by_row)
        if operator.name in _CHOOSES
        for deciding_operator in _behind(structure, operator.reads[1:])
    )


def _read_by_row(operator: Operator) -> tuple[Value, ...]:
    return operator.reads[:1] if operator.name in _PUTS else operator.reads


def _behind(
    structure: Structure,
    values: Iterable[Value],
    follow: Callable[[Operator], Iterable[Value]] = lambda operator: operator.reads,
) -> Iterator[Operator]:
    """The operators that values come from, the last ones first; ``follow`` says which of what one reads is followed."""
    waiting, seen = [value.storage for value in values], set[int]()
    while waiting:
        storage = waiting.pop()
        if storage in seen:
            continue
        seen.add(storage)
        for operator in structure.writers.get(storage, []):
            yield operator
            waiting += [value.storage for value in follow(operator)]


def output_storages(structure: Structure) -> list[int]:
    """Find the storages that may be the model's output: what outermost calls return, and what nothing reads.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> structure = record(model, lambda: model(torch.ones(1, 2)))
        >>> output_storages(structure) == [value.storage for value in structure.calls_of["1"][0].writes]
        True
    """
    written = {value.storage for operator in structure.operators for value in operator.writes}
    returned = {value.storage for call in structure.calls if call.outermost for value in call.writes}
    return [*returned, *(written - returned - structure.readers.keys())]


def shared_operands(
    structure: Structure, operands: Mapping[str, int], identity: Callable[[Value], Value] = lambda value: value
) -> list[list[tuple[str, int]]]:
    """Group the quantized inputs of layers that are the very same tensors.

    Two inputs belong together if their layers are called equally often and, at each call in turn, the inputs are the
    same view of the same storage in the same state.

    Args:
        structure: As observed.
        operands: Number of quantized inputs of each layer, by its full name.
        identity: Maps tensors that count as the same one to one of them.

    Returns:
        Groups of at least two (layer, position among its floating-point inputs), in the order of ``operands``. Two
        inputs of one layer are in one group where it is given the same tensor twice.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> class Gate(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.gate, self.down = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.down(self.up(x) * self.gate(x))
        >>> model = Gate()
        >>> shared_operands(record(model, lambda: model(torch.ones(1, 2))), {"up": 1, "gate": 1, "down": 1})
        [[('up', 0), ('gate', 0)]]
    """
    readers: dict[tuple[Value | None, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, count in operands.items():
        calls = structure.calls_of.get(name, [])
        for index in range(min((count, *(len(call.operands) for call in calls))) if calls else 0):
            given = [call.operands[index] for call in calls]
            values = tuple(value if value is None else identity(value) for value in given)
            if None not in values:
                readers[values].append((name, index))
    return [group for group in readers.values() if len(group) > 1]


def layers_sharing_an_input(structure: Structure, names: Iterable[str]) -> list[list[str]]:
    """Group layers that read the very same tensor, as their first one, at any of their calls.

    Args:
        structure: As observed.
        names: Full names of the layers.

    Returns:
        Groups of at least two names.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model, x = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), torch.ones(1, 2)
        >>> layers_sharing_an_input(record(model, lambda: model[0](x) + model[1](x)), ["0", "1"])
        [['0', '1']]
    """
    readers: dict[Value, list[str]] = defaultdict(list)
    for name in names:
        for call in structure.calls_of.get(name, []):
            for value in call.reads[:1]:
                readers[value].append(name)
    return [list(dict.fromkeys(layers)) for layers in readers.values() if len(set(layers)) > 1]


def layers_feeding_an_add(structure: Structure, names: Iterable[str]) -> list[list[str]]:
    """Group layers whose outputs are added up: directly, or after operators with a single tensor as their input
    (normalizations, activations, views) in between.

    Args:
        structure: As observed.
        names: Full names of the layers.

    Returns:
        Groups of at least two names, one for each addition.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model, x = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), torch.ones(1, 2)
        >>> structure = record(model, lambda: torch.relu(model[0](x)) + model[1](x))
        >>> layers_feeding_an_add(structure, ["0", "1"])
        [['0', '1']]
    """
    layers = set(names)
    groups = []
    for operator in structure.operators:
        if operator.name in _ADDS and _layer_of(structure, operator, layers) is None:
            sources = [source_of(structure, value, layers) for value in dict.fromkeys(operator.reads)]
            found = list(dict.fromkeys(name for name in sources if name is not None))
            if len(found) > 1:
                groups.append(found)
    return groups


def _layer_of(structure: Structure, operator: Operator, layers: Collection[str]) -> str | None:
    """The outermost of the layers that an operator ran in, or None."""
    return next((name for index in operator.scope if (name := structure.calls[index].name) in layers), None)


def source_of(structure: Structure, value: Value | None, layers: Collection[str]) -> str | None:
    """Find the layer that a value comes from with no second tensor coming in on the way.

    Args:
        structure: As observed.
        value: The value; None for one without a storage of its own.
        layers: Names of the layers.

    Returns:
        Name of the layer; None if there is none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> structure = record(model, lambda: model(torch.ones(1, 2)))
        >>> source_of(structure, structure.calls_of["2"][0].reads[0], ["0", "2"])
        '0'
    """
    seen = set()
    while value is not None and value not in seen:
        seen.add(value)
        writer = next((o for o in reversed(structure.writers.get(value.storage, [])) if _wrote(o, value)), None)
        if writer is None:
            return None
        if (layer := _layer_of(structure, writer, layers)) is not None:
            return layer
        inputs = [read for read in dict.fromkeys(writer.reads) if not structure.is_fixed(read)]
        if len(inputs) != 1:
            return None
        value = inputs[0]
    return None


def _wrote(operator: Operator, value: Value) -> bool:
    """Whether an operator made this state of a tensor, rather than a view of it."""
    reads, writes = ({(v.storage, v.version) for v in values} for values in (operator.reads, operator.writes))
    return (value.storage, value.version) in writes - reads


def _is_inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")
