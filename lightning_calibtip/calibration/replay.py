"""Replay: the inputs of one unit after the other, at the cost of a constant number of passes over the calibration set.

Finished modules answer with their stored outputs instead of computing, and each pass stops at the unit in work. Once
all units inside a parent are finished, the parent itself is stored and its insides are no longer run. Of the stored
outputs only those are kept that something still to come depends on.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..quantization.structure import Structure
from .calibration_set import CalibrationSet


@dataclass
class UnitCall:
    """Arguments of one call of a unit's module, without gradients."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _ReachedUnit(BaseException):
    """Ends a pass; not an ``Exception``, so that no ``except`` clause of the user's model holds it back."""


@dataclass(frozen=True)
class _Dead:
    """Stands for a stored output that no unit to come depends on."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass
class Replay:
    """One stream (float or quantized) of the calibration set through a model.

    Args:
        model: Must be in eval mode.
        structure: Its observed structure.
        calibration: The batches.
        units: Names of the modules whose inputs will be asked for, in this order, none inside another.
    """

    model: nn.Module
    structure: Structure
    calibration: CalibrationSet
    units: list[str]
    _stored: dict[str, list[Any]] = field(default_factory=dict)
    _finished: set[str] = field(default_factory=set)

    @torch.no_grad()
    def capture(self, unit: str) -> list[list[UnitCall]]:
        """Inputs of ``unit``: for each batch, each call's arguments.

        Stored outputs stand in for everything finished. A module that is called several times is followed to its last
        call, with what lies between computing as it is now.

        Raises:
            RuntimeError: If a batch does not reach the unit.
        """
        calls = len(self.structure.calls_of[unit])
        promoted: dict[str, list[Any]] = {name: [] for name in self._parents_to_store(unit)}
        captured = [self._capture_batch(index, unit, calls, promoted) for index in range(len(self.calibration))]
        for name, outputs in promoted.items():
            if len(outputs) == len(self.calibration):
                self._store(name, outputs)
        return captured

    def finish(self, unit: str, outputs: list[list[Any]]) -> None:
        """From now on ``unit`` answers with ``outputs`` (for each batch, each call's output)."""
        self._finished.add(unit)
        if len(self.structure.calls_of[unit]) == 1:
            self._store(unit, [calls[0] for calls in outputs])
        live = self._live()
        for name, stored in self._stored.items():
            if name not in live:
                self._stored[name] = [tree_map(_forget, output) for output in stored]

    @property
    def stored_bytes(self) -> int:
        """Memory that stored outputs take."""
        leaves = torch.utils._pytree.tree_leaves(self._stored)
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))

    def _store(self, name: str, outputs: list[Any]) -> None:
        self._stored[name] = outputs
        for inner in [other for other in self._stored if other != name and _is_inside(other, name)]:
            del self._stored[inner]

    def _capture_batch(self, index: int, unit: str, calls: int, promoted: dict[str, list[Any]]) -> list[UnitCall]:
        captured: list[UnitCall] = []

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            copy = Tensor.clone if calls > 1 else Tensor.detach
            args, kwargs = tree_map(lambda leaf: copy(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            captured.append(UnitCall(args, kwargs))
            if len(captured) == calls:
                raise _ReachedUnit

        with ExitStack() as stack:
            for name, stored in self._stored.items():
                stack.enter_context(_answering(self.model.get_submodule(name), stored[index]))
            for name, outputs in promoted.items():
                parent = self.model.get_submodule(name)
                stack.callback(parent.register_forward_hook(_keep_in(outputs)).remove)
            hook = self.model.get_submodule(unit).register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
            try:
                self.calibration.run(index)
            except _ReachedUnit:
                return captured
        raise RuntimeError(
            f"{unit}: calibration batch {index} called it {len(captured)} times, the first batch {calls} times; "
            "leave it float with overrides={...: None}."
        )

    def _parents_to_store(self, unit: str) -> list[str]:
        """Modules whose units are all finished, which this pass can store as a whole (outermost only)."""
        names: set[str] = set()
        for finished in self._finished:
            if any(_is_inside(finished, stored) and finished != stored for stored in self._stored):
                continue
            parts = finished.split(".")
            for length in range(len(parts) - 1, 0, -1):
                parent = ".".join(parts[:length])
                inside = [other for other in self.units if _is_inside(other, parent)]
                if all(other in self._finished for other in inside) and self._is_closed(parent):
                    names.add(parent)
        names -= set(self._stored)
        return [name for name in names if not any(_is_inside(name, other) and name != other for other in names)]

    def _is_closed(self, name: str) -> bool:
        """Whether a module is called once and what it computes leaves it by its return value alone."""
        calls = self.structure.calls_of.get(name, [])
        if len(calls) != 1:
            return False
        call = calls[0]
        returned = {value.storage for value in call.writes}
        made = {value.storage for o in self.structure.operators[call.start : call.stop] for value in o.writes}
        outside = self.structure.operators[: call.start] + self.structure.operators[call.stop :]
        return not any(read.storage in made - returned for operator in outside for read in operator.reads)

    def _live(self) -> set[str]:
        """Stored modules whose outputs some unit to come depends on, by walking the operators backwards."""
        structure = self.structure
        stored_calls = {structure.calls_of[name][0].index: name for name in self._stored}
        pending = [name for name in self.units if not any(_is_inside(name, stored) for stored in self._stored)]
        waiting: list[int] = []
        for name in pending:
            for call in structure.calls_of[name]:
                waiting += [value.storage for value in call.reads]
                for operator in structure.operators[call.start : call.stop]:
                    waiting += [value.storage for value in operator.reads]
        live: set[str] = set()
        seen: set[int] = set()
        while waiting:
            storage = waiting.pop()
            if storage in seen:
                continue
            seen.add(storage)
            for name in self._stored:
                if any(value.storage == storage for value in structure.calls_of[name][0].writes):
                    live.add(name)
            for operator in structure.writers.get(storage, []):
                inside = next((stored_calls[index] for index in operator.scope if index in stored_calls), None)
                if inside is not None:
                    live.add(inside)
                else:
                    waiting += [value.storage for value in operator.reads]
        return live


def _is_inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _keep_in(outputs: list[Any]) -> Callable[..., None]:
    return lambda module, args, output: outputs.append(tree_map(_recall, output))


def _forget(leaf: Any) -> Any:
    return _Dead(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _recall(leaf: Any) -> Any:
    """A fresh tensor each time, for what follows may change it in place."""
    if isinstance(leaf, _Dead):
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside, calling ``module`` gives ``output`` and computes nothing."""
    quantizer = getattr(module, "input_quantizer", None)
    was_enabled = quantizer is not None and quantizer.enabled
    had = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: tree_map(_recall, output)
    if quantizer is not None:
        quantizer.enabled = False
    try:
        yield
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had
        if quantizer is not None:
            quantizer.enabled = was_enabled
