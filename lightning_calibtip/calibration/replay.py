"""Replay: the inputs of one unit after the other, at the cost of a constant number of passes over the calibration set.

Finished modules answer with their stored outputs instead of computing, and each pass stops at the unit in work. Once
all units inside a parent are finished, the parent itself is stored and its insides are no longer run; so are modules
without units that come before. Of the stored outputs only those are kept that something still to come depends on.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..quantization.layers import INPUT_QUANTIZERS
from ..quantization.structure import Structure
from .activation_store import ActivationStore
from .calibration_set import CalibrationSet
from .recording import Recording


@dataclass
class UnitCall:
    """Arguments of one call of a unit's module, without gradients."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CalledAgainError(RuntimeError):
    """A batch calls a module more often than the first batch did, so that stored outputs cannot answer for it."""


class _ReachedUnit(BaseException):
    """Ends a pass; not an ``Exception``, so that no ``except`` clause of the user's model holds it back."""


@dataclass
class Replay:
    """One stream (float or quantized) of the calibration set through a model.

    Args:
        model: Must be in eval mode.
        structure: Its observed structure.
        calibration: The batches.
        units: Names of the modules whose inputs will be asked for, in this order, none inside another.
        store: Where outputs are kept.
        to_end: Whether ``run`` will be called, which needs what the model's own output depends on as well.
    """

    model: nn.Module
    structure: Structure
    calibration: CalibrationSet
    units: list[str]
    store: ActivationStore = field(default_factory=ActivationStore)
    to_end: bool = False
    _stored: dict[str, Recording] = field(default_factory=dict)
    _finished: set[str] = field(default_factory=set)
    _closed: dict[str, bool] = field(default_factory=dict)

    def calls(self, unit: str) -> int:
        """How often the model calls the unit in one batch."""
        return len(self.structure.calls_of[unit])

    def recording(self, unit: str, channels_last: bool = False) -> Recording:
        """An empty recording with room for each call of the unit in each batch."""
        return Recording(self.store, self.calls(unit) * len(self.calibration), channels_last)

    def capture(self, unit: str) -> Iterator[list[UnitCall]]:
        """Inputs of ``unit``, batch by batch: the arguments of each call.

        Stored outputs stand in for everything finished. A module that is called several times is followed to its last
        call, with what lies between computing as it is now.

        Raises:
            RuntimeError: If a batch does not reach the unit.
        """
        calls, batches = self.calls(unit), len(self.calibration)
        promoted = {name: Recording(self.store, batches) for name in self._to_store(unit)}
        for index in range(batches):
            yield self._capture_batch(index, unit, calls, promoted)
        for name, outputs in promoted.items():
            if len(outputs) == batches:
                self._store(name, outputs)

    @torch.no_grad()
    def run(self, index: int) -> Any:
        """Pass batch ``index`` through the whole model, where everything finished answers with its stored outputs, and
        return the model's output (``to_end`` only)."""
        with ExitStack() as stack:
            self._answer(stack, index)
            return self.calibration.run(index)

    def forget(self) -> None:
        """Free everything that is stored; the replay is over."""
        for outputs in self._stored.values():
            outputs.forget()
        self._stored.clear()

    def finish(self, unit: str, outputs: Recording) -> None:
        """From now on ``unit`` answers with ``outputs`` (of each call, batch by batch).

        What nothing to come depends on is freed; ``outputs`` itself only when the next unit is finished.
        """
        self._finished.add(unit)
        if self.calls(unit) == 1:
            self._store(unit, outputs)
        else:
            # It will compute again, wherever it is called.
            outputs.forget()
        live = self._live() | {unit}
        for name, stored in self._stored.items():
            if name not in live:
                stored.forget()

    def _store(self, name: str, outputs: Recording) -> None:
        self._stored[name] = outputs
        for inner in [other for other in self._stored if other != name and _is_inside(other, name)]:
            self._stored.pop(inner).forget()

    @torch.no_grad()
    def _capture_batch(self, index: int, unit: str, calls: int, promoted: dict[str, Recording]) -> list[UnitCall]:
        captured: list[UnitCall] = []

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            copy = Tensor.clone if calls > 1 else Tensor.detach
            args, kwargs = tree_map(lambda leaf: copy(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            captured.append(UnitCall(args, kwargs))
            if len(captured) == calls:
                raise _ReachedUnit

        with ExitStack() as stack:
            self._answer(stack, index)
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

    def _answer(self, stack: ExitStack, index: int) -> None:
        """Within ``stack``, everything stored answers for batch ``index``."""
        for name, stored in self._stored.items():
            stack.enter_context(_answering(self.model.get_submodule(name), stored, index))

    def _to_store(self, unit: str) -> list[str]:
        """Modules that this pass runs before it reaches the unit and that can be stored as a whole (outermost only):
        parents of finished units, and whatever else has no units inside."""
        first = self.structure.calls_of[unit][0].start
        # Parametrizations that ran when the structure was observed may be gone.
        modules = dict(self.model.named_modules())
        names = [
            name
            for name, calls in self.structure.calls_of.items()
            if name in modules
            and modules[name] is not self.model
            and name not in self._stored
            and calls[0].stop <= first
            and all(other in self._finished for other in self.units if _is_inside(other, name))
            and not any(_is_inside(name, stored) for stored in self._stored)
            and name not in self._finished
            and self._is_closed(name)
        ]
        return [name for name in names if not any(_is_inside(name, other) and name != other for other in names)]

    def _is_closed(self, name: str) -> bool:
        """Whether a module is called once, what it computes leaves it by its return value alone, and it changes nothing
        that it is given."""
        if name not in self._closed:
            self._closed[name] = self._looks_closed(name)
        return self._closed[name]

    def _looks_closed(self, name: str) -> bool:
        calls = self.structure.calls_of.get(name, [])
        if len(calls) != 1:
            return False
        call = calls[0]
        returned = {value.storage for value in call.writes}
        inside = self.structure.operators[call.start : call.stop]
        made = {value.storage for operator in inside for value in operator.writes}
        if made & {value.storage for value in call.reads}:
            return False
        read_outside = {
            read.storage
            for operator in (*self.structure.operators[: call.start], *self.structure.operators[call.stop :])
            for read in operator.reads
        }
        return not (made - returned) & read_outside

    def _live(self) -> set[str]:
        """Stored modules whose outputs some unit to come, or the end, depends on: the operators are walked
        backwards."""
        structure = self.structure
        stored_calls = {structure.calls_of[name][0].index: name for name in self._stored}
        pending = [name for name in self.units if not any(_is_inside(name, stored) for stored in self._stored)]
        waiting = self._ends() if self.to_end else []
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

    def _ends(self) -> list[int]:
        """Storages that may be the model's output: what outermost calls return, and what nothing reads."""
        written = {value.storage for operator in self.structure.operators for value in operator.writes}
        returned = {value.storage for call in self.structure.calls if call.outermost for value in call.writes}
        return [*returned, *(written - self.structure.readers.keys())]


def _is_inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _keep_in(outputs: Recording) -> Callable[..., None]:
    return lambda module, args, output: outputs.append(output)


@contextmanager
def _answering(module: nn.Module, outputs: Recording, index: int) -> Iterator[None]:
    """Inside, calling ``module`` gives the output of batch ``index`` and computes nothing."""
    quantizers = [getattr(module, name) for name in INPUT_QUANTIZERS if hasattr(module, name)]
    enabled = [quantizer.enabled for quantizer in quantizers]
    had = module.__dict__.get("forward")
    answered = False

    def answer(*args: Any, **kwargs: Any) -> Any:
        nonlocal answered
        if answered:
            raise CalledAgainError(
                f"Calibration batch {index} calls a {type(module).__name__} more often than the first batch did; leave "
                "it float with overrides={...: None}."
            )
        answered = True
        return outputs[index]

    module.forward = answer
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had
        for quantizer, was in zip(quantizers, enabled, strict=True):
            quantizer.enabled = was
