"""The structure of a model as observed while it ran one batch: no graph is traced, nothing is assumed from names.

From the record of calls and operators follow, as facts, the execution order, who reads a value, and which normalization
or activation function comes after a layer. ``observe`` makes the record, ``blocks`` and ``dataflow`` ask more of it.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

Activation = Callable[[Tensor], Tensor]

# The fused kernels of attention have names of their own (``scaled_dot_product_flash_attention_for_cpu``).
_ATTENTION = "scaled_dot_product"

# Operators that take the shape, the type or the device of what they read, and no value.
_WITHOUT_VALUES = {
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
}


@dataclass(frozen=True)
class Value:
    """One state of one tensor.

    Args:
        storage: Number of its storage.
        version: Number of the storage's state; every in-place operator makes a new one.
        view: Offset, shape and strides of the tensor in its storage.

    Example:
        >>> Value(1, 0, (0, (2, 2), (2, 1))) == Value(1, 1, (0, (2, 2), (2, 1)))
        False
    """

    storage: int
    version: int
    view: tuple[Any, ...]


@dataclass(frozen=True)
class Operator:
    """One call of an operator of PyTorch.

    Args:
        name: Name of the operator, without marks of in-place or private variants (``"relu"``).
        reads: Tensors among its arguments.
        writes: Tensors that it returned.
        scope: Indices of the module calls that it ran in, outermost first.
        replay: The same function of one input, if it is an activation function.
        is_view: Whether it returns views of what it reads, and changes nothing.
        decisive: Those of what it reads whose values decide over the shape that it returns, or over a number.

    Example:
        See ``Structure``.
    """

    name: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    scope: tuple[int, ...]
    replay: Activation | None
    is_view: bool = False
    decisive: tuple[Value, ...] = ()


@dataclass
class ModuleCall:
    """One call of a module.

    Args:
        index: Position in the list of calls.
        name: Full name of the module.
        reads: All tensors in its arguments, in nested ones too.
        start: Position of its first operator in the list of operators.
        outermost: Whether no other module was running.
        operands: Its floating-point inputs as quantization counts them: the floating-point tensors among the positional
            arguments, then among the keyword arguments; None stands for a tensor without a storage of its own.
        writes: All tensors in what it returned.
        stop: Position after its last operator.

    Example:
        See ``Structure``.
    """

    index: int
    name: str
    reads: tuple[Value, ...]
    start: int
    outermost: bool
    operands: tuple[Value | None, ...] = ()
    writes: tuple[Value, ...] = ()
    stop: int = 0


@dataclass(frozen=True)
class Fold:
    """A BatchNorm that is folded into a layer.

    Args:
        layer: Full name of the layer.
        normalization: Full name of the BatchNorm.

    Example:
        See ``prove_folds``.
    """

    layer: str
    normalization: str


@dataclass
class Structure:
    """What running one batch has shown.

    Args:
        operators: All operators in the order of execution.
        calls: All calls of modules in the order in which they began.
        folds: BatchNorms that running has proved to be foldable, in the order of execution (see ``observe``).
        unfolded_norms: The other BatchNorms, and why each is left alone.
        led_layers: Layers whose weights another module takes for a function, which is led to them; and that module.
        weights: Storages of the layers' weights.
        parameters: Storages of all parameters, by their full names.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> structure = record(model, lambda: model(torch.ones(1, 2)))
        >>> [call.name for call in structure.calls]
        ['', '0', '1']
        >>> structure.operators[-1].name
        'relu'
    """

    operators: list[Operator] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    folds: tuple[Fold, ...] = ()
    unfolded_norms: dict[str, str] = field(default_factory=dict)
    led_layers: dict[str, str] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    @cached_property
    def calls_of(self) -> dict[str, list[ModuleCall]]:
        """Calls by module name, in the order of the first call."""
        calls: dict[str, list[ModuleCall]] = defaultdict(list)
        for call in self.calls:
            calls[call.name].append(call)
        return dict(calls)

    @cached_property
    def readers(self) -> dict[int, list[Operator]]:
        """Operators by the storages that they read."""
        readers: dict[int, list[Operator]] = defaultdict(list)
        for operator in self.operators:
            for storage in {value.storage for value in operator.reads}:
                readers[storage].append(operator)
        return readers

    @cached_property
    def writers(self) -> dict[int, list[Operator]]:
        """Operators by the storages that they write."""
        writers: dict[int, list[Operator]] = defaultdict(list)
        for operator in self.operators:
            for storage in {value.storage for value in operator.writes}:
                writers[storage].append(operator)
        return writers

    def is_fixed(self, value: Value) -> bool:
        """Whether a value is neither an input nor computed in this run: a parameter, a buffer or a constant."""
        return value.storage not in self.writers and value.storage not in self._entered

    def is_view_of_fixed(self, value: Value) -> bool:
        """Whether a value is a parameter, a buffer or a constant, or a view of one that nothing changes."""
        writers = self.writers.get(value.storage, ())
        return value.storage not in self._entered and all(operator.is_view for operator in writers)

    def weight_taken_by(self, layer: str) -> str | None:
        """Name of the module that takes the weight of a layer which never runs itself; None if there is none."""
        if layer in self.calls_of:
            return None
        scopes = [operator.scope for operator in self.readers.get(self.weights.get(layer, 0), ()) if operator.scope]
        return self.calls[scopes[0][-1]].name if scopes else None

    def counts(self, operator: Operator) -> bool:
        """Whether the model's output depends on the values that an operator reads."""
        if operator.is_view or operator.name in _WITHOUT_VALUES:
            # Who reads the view is another one.
            return False
        reached = {value.storage for value in operator.writes}
        begin = next(index for index, other in enumerate(self.operators) if other is operator)
        for other in self.operators[begin + 1 :]:
            if other.name not in _WITHOUT_VALUES and any(value.storage in reached for value in other.reads):
                reached.update(value.storage for value in other.writes)
        return bool(reached & self._returned)

    def is_returned(self, value: Value) -> bool:
        """Whether the model itself returned a tensor, or what was run of it."""
        return value in self._outputs

    def normalization_after(self, layer: str, is_normalization: Callable[[str], bool]) -> tuple[str | None, str]:
        """Find the module that normalizes exactly the output of ``layer``, and nothing else.

        Every call of the layer must be followed by the same module on the very tensor, unchanged in place, that the
        layer returned, or on a view of it; nothing else may read that tensor; and the module must not serve another
        layer.

        Args:
            layer: Full name of the layer.
            is_normalization: Whether the module of a name is a normalization.

        Returns:
            Name of the module and ``""``; or None and the reason, which is ``""`` if no normalization follows at all.

        Example:
            See ``record``.
        """
        followers: set[str] = set()
        calls = self.calls_of.get(layer, [])
        for call in calls:
            nexts = [c for c in self.calls if is_normalization(c.name) and _reads_alone(c, call)]
            if len(nexts) != 1:
                return None, "" if not nexts else "several normalizations read its output"
            final = call.writes[0]
            others = [
                operator
                for operator in self.readers[final.storage]
                if nexts[0].index not in operator.scope
                # A layer may return a view of what it computed, and a normalization read one.
                and {(w.storage, w.version) for w in operator.writes} != {(final.storage, final.version)}
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
        """Find the activation function that alone reads the output of module ``name``, at all its calls.

        Args:
            name: Full name of the module.

        Returns:
            The function, which does not change its input; or None if there is none.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from lightning_calibtip.network.observe import record
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU6())
            >>> record(model, lambda: model(torch.ones(1, 2))).activation_after("0")(torch.tensor([-1.0, 9.0]))
            tensor([0., 6.])
        """
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
    def _returned(self) -> set[int]:
        """Storages of what the model itself returned."""
        return {value.storage for call in self.calls_of.get("", []) for value in call.writes}

    @cached_property
    def _outputs(self) -> set[Value]:
        """What outermost calls returned."""
        return {value for call in self.calls if call.outermost for value in call.writes}

    @cached_property
    def _entered(self) -> set[int]:
        """Storages that came into the model from outside."""
        return {value.storage for call in self.calls if call.outermost for value in call.reads}


def is_fused_attention(operator: Operator) -> bool:
    """Whether an operator is attention as a whole.

    Example:
        >>> is_fused_attention(Operator("scaled_dot_product_flash_attention_for_cpu", (), (), (), None))
        True
    """
    return operator.name.startswith(_ATTENTION)


def _reads_alone(call: ModuleCall, writer: ModuleCall) -> bool:
    """Whether a call reads what another one has written, or a view of it, and nothing else."""
    return len(writer.writes) == 1 and {(read.storage, read.version) for read in call.reads} == {
        (writer.writes[0].storage, writer.writes[0].version)
    }
