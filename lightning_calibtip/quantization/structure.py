"""The structure of a model as observed while it runs one batch: no graph is traced, nothing is assumed from names.

Module hooks see which module was called when, with which tensors; a ``TorchDispatchMode`` sees every operator between
them, with the identity and the version of each tensor. From this record follow, as facts, the execution order, who
consumes a value, which activation function comes after a layer, and where branches join.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Activation = Callable[[Tensor], Tensor]

_ACTIVATIONS = {
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "sigmoid", "tanh", "softplus", "log_sigmoid", "threshold", "clamp", "clamp_min",
}  # fmt: skip
_JOINS = {"add", "sub", "cat", "mul", "maximum", "bmm", "matmul", "baddbmm"}
_PRODUCTS = {"bmm", "matmul", "baddbmm"}
# The fused kernels of attention have names of their own (``scaled_dot_product_flash_attention_for_cpu``).
_ATTENTION = "scaled_dot_product"


@dataclass(frozen=True)
class Value:
    """One state of one tensor: which storage, which in-place version of it, and which view of it."""

    storage: int
    version: int
    view: tuple[Any, ...]


@dataclass(frozen=True)
class Operator:
    """One operator call: its name, what it read and wrote, and the modules it ran in, outermost first."""

    name: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    scope: tuple[int, ...]
    replay: Activation | None


@dataclass
class ModuleCall:
    """One call of a module: ``start`` and ``stop`` are positions in the list of operators."""

    index: int
    name: str
    reads: tuple[Value, ...]
    start: int
    outermost: bool
    writes: tuple[Value, ...] = ()
    stop: int = 0


@dataclass
class Structure:
    """What running one batch has shown. Operators and calls are in the order of execution."""

    operators: list[Operator] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)

    @cached_property
    def calls_of(self) -> dict[str, list[ModuleCall]]:
        """Calls by module name, in the order of the first call."""
        calls: dict[str, list[ModuleCall]] = defaultdict(list)
        for call in self.calls:
            calls[call.name].append(call)
        return dict(calls)

    @cached_property
    def readers(self) -> dict[int, list[Operator]]:
        """Operators by the storage they read."""
        readers: dict[int, list[Operator]] = defaultdict(list)
        for operator in self.operators:
            for storage in {value.storage for value in operator.reads}:
                readers[storage].append(operator)
        return readers

    @cached_property
    def writers(self) -> dict[int, list[Operator]]:
        """Operators by the storage they write."""
        writers: dict[int, list[Operator]] = defaultdict(list)
        for operator in self.operators:
            for storage in {value.storage for value in operator.writes}:
                writers[storage].append(operator)
        return writers

    @cached_property
    def _returned(self) -> set[int]:
        """Storages of what the model itself returned."""
        return {value.storage for call in self.calls_of.get("", []) for value in call.writes}

    def normalization_after(self, layer: str, is_normalization: Callable[[str], bool]) -> tuple[str | None, str]:
        """The module that normalizes exactly the output of ``layer``, and nothing else, or None and the reason.

        Every call of the layer must be followed by the same module on the very tensor, unchanged in place, that the
        layer returned; nothing else may read that tensor; and the module must not serve another layer.
        """
        followers: set[str] = set()
        calls = self.calls_of.get(layer, [])
        for call in calls:
            nexts = [c for c in self.calls if is_normalization(c.name) and c.reads and c.reads == call.writes]
            if len(nexts) != 1:
                return None, "" if not nexts else "several normalizations read its output"
            final = call.writes[0]
            others = [
                operator
                for operator in self.readers[final.storage]
                if nexts[0].index not in operator.scope
                # A layer may return a view of what it computed.
                and not (call.index in operator.scope and {w.storage for w in operator.writes} == {final.storage})
                and any(read.storage == final.storage and read.version >= final.version for read in operator.reads)
            ]
            if others:
                return None, f"its output is also read by {others[0].name}"
            if final.storage in self._returned and nexts[0].writes != call.writes:
                return None, "its output is also returned by the model"
            followers.add(nexts[0].name)
        if len(followers) != 1:
            return None, "different normalizations follow its calls" if followers else ""
        follower = followers.pop()
        if len(self.calls_of[follower]) != len(calls):
            return None, f"{follower} also normalizes other tensors"
        return follower, ""

    def activation_after(self, name: str) -> Activation | None:
        """The activation function that alone reads the output of module ``name``, at all its calls, or None."""
        found: list[Operator] = []
        for call in self.calls_of.get(name, []):
            if len(call.writes) != 1 or call.writes[0].storage in self._returned:
                return None
            inner = set(range(call.start, call.stop))
            readers = [o for i, o in enumerate(self.operators) if call.writes[0] in o.reads and i not in inner]
            if len(readers) != 1 or readers[0].replay is None:
                return None
            found.append(readers[0])
        if not found or len({operator.name for operator in found}) != 1:
            return None
        return found[0].replay

    @cached_property
    def _entered(self) -> set[int]:
        """Storages that came into the model from outside."""
        return {value.storage for call in self.calls if call.outermost for value in call.reads}

    def is_fixed(self, value: Value) -> bool:
        """Whether a value is neither an input nor computed in this run: a parameter, a buffer or a constant."""
        return value.storage not in self.writers and value.storage not in self._entered

    def blocks(self, contains: Callable[[str], bool]) -> list[str]:
        """Names of the deepest modules in which paths fork and join again (residual connections, attention).

        Attention is not left alone: the block is the layer of the transformer that it belongs to, with its residual
        connections, and with a second attention (to an encoder) where these go around both.

        Args:
            contains: Whether a module holds anything worth a block of its own.

        Returns:
            Names that do not contain each other, in the order of execution; never the whole model.
        """
        attentions = {name for operator in self.operators if (name := self._attention_of(operator, contains))}
        owners = {
            name
            for operator in self.operators
            if not any(self.calls[index].name in attentions for index in operator.scope)
            and (name := self._owner_of_join(operator))
            and contains(name)
        }
        around = {_layer_around(name, owners, attentions) for name in attentions}
        layers = {name for name in around if not any(_is_below(name, other) for other in around)}
        deepest = {name for name in owners if not any(_is_below(other, name) for other in owners | layers)}
        deepest = {name for name in deepest if not any(name == layer or _is_below(name, layer) for layer in layers)}
        return sorted(layers | deepest, key=list(self.calls_of).index)

    def _attention_of(self, operator: Operator, contains: Callable[[str], bool]) -> str | None:
        """Innermost module, with something inside, in which two computed tensors are multiplied; or None."""
        if operator.name not in _PRODUCTS and not is_fused_attention(operator):
            return None
        if len([value for value in dict.fromkeys(operator.reads) if not self.is_fixed(value)]) < 2:
            return None
        names = [self.calls[index].name for index in reversed(operator.scope)]
        return next((name for name in names if name and contains(name)), None)

    def _owner_of_join(self, operator: Operator) -> str | None:
        """Innermost module inside which the inputs of a joining operator have a common ancestor."""
        if operator.name not in _JOINS and not is_fused_attention(operator):
            return None
        inputs = [value for value in dict.fromkeys(operator.reads) if not self.is_fixed(value)]
        if len(inputs) < 2:
            return None
        for index in reversed(operator.scope):
            call = self.calls[index]
            if call.name == "":
                return None
            ancestors = [self._ancestors(value, call) for value in inputs[:2]]
            if ancestors[0] & ancestors[1]:
                return call.name
        return None

    def _ancestors(self, value: Value, call: ModuleCall) -> set[int]:
        """Storages that ``value`` was computed from, inside one call of a module (its own inputs included)."""
        found, waiting = {value.storage}, [value.storage]
        inside = self.operators[call.start : call.stop]
        producers: dict[int, list[Operator]] = defaultdict(list)
        for operator in inside:
            for written in operator.writes:
                producers[written.storage].append(operator)
        entered = {read.storage for read in call.reads}
        while waiting:
            storage = waiting.pop()
            if storage in entered:
                continue
            for operator in producers[storage]:
                for read in operator.reads:
                    if read.storage not in found and not self.is_fixed(read):
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


class _Recorder(TorchDispatchMode):
    """Writes down every operator; hooks on the modules tell it where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.structure = Structure()
        self.scope: list[int] = []
        self._serials: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count = 0

    def value(self, tensor: Tensor, later: int = 0) -> Value:
        """Identity of the present state of a tensor; an address that was freed and taken again is a new storage."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._serials.get(address)
        if known is None or known[0].expired():
            self._count += 1
            known = (StorageWeakRef(storage), self._count)
            self._serials[address] = known
        version = 0 if tensor.is_inference() else tensor._version
        view = (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        return Value(known[1], version + later, view)

    def values(self, tree: Any) -> tuple[Value, ...]:
        """Identities of all tensors in nested arguments."""
        return tuple(self.value(leaf) for leaf in tree_leaves(tree) if _has_storage(leaf))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = self.values((args, kwargs))
        output = func(*args, **kwargs)
        mutates = func._schema.is_mutable
        written = [leaf for leaf in tree_leaves(output) if _has_storage(leaf)]
        # The version counter of an in-place operator moves only after this call.
        changed = {value.storage for value in reads} if mutates else set()
        writes = tuple(self.value(t, int(self.value(t).storage in changed)) for t in written)
        name = func._schema.name.removeprefix("aten::").removesuffix("_").removeprefix("_")
        replay = _replay(func, args, kwargs) if name in _ACTIVATIONS else None
        self.structure.operators.append(Operator(name, reads, writes, tuple(self.scope), replay))
        return output


def is_fused_attention(operator: Operator) -> bool:
    """Whether an operator is attention as a whole."""
    return operator.name.startswith(_ATTENTION)


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested


def _replay(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Activation | None:
    """The activation as a differentiable function of its input, or None if it reads other tensors too."""
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args[1:], kwargs))):
        return None
    in_place = func._schema.is_mutable

    def activation(x: Tensor) -> Tensor:
        output: Tensor = func(x.clone() if in_place else x, *args[1:], **kwargs)
        return output

    return activation


@contextmanager
def _recording(model: nn.Module) -> Iterator[Structure]:
    recorder = _Recorder()
    structure = recorder.structure

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            reads = recorder.values((args, kwargs))
            call = ModuleCall(len(structure.calls), name, reads, len(structure.operators), not recorder.scope)
            structure.calls.append(call)
            recorder.scope.append(call.index)

        return hook

    def leaving(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = structure.calls[recorder.scope.pop()]
        call.writes = recorder.values(output)
        call.stop = len(structure.operators)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leaving, with_kwargs=True))
    try:
        with torch.no_grad(), recorder:
            yield structure
    finally:
        for handle in handles:
            handle.remove()


def observe_structure(model: nn.Module, run: Callable[[], Any]) -> Structure:
    """Run one batch and record what happens.

    Args:
        model: The model; its own mode (train or eval) is left as it is.
        run: Calls the model once, on one batch.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
        >>> structure = observe_structure(net, lambda: net(torch.ones(1, 1, 4, 4)))
        >>> structure.normalization_after("0", lambda name: name == "1")
        ('1', '')
    """
    with _recording(model) as structure:
        run()
    return structure
