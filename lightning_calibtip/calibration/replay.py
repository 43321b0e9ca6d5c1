"""Replay: inputs and outputs of one unit after the other, at a constant number of passes over the calibration set.

Finished modules answer with their stored outputs instead of computing, and each pass stops at the unit in work. Once
all units inside a parent are finished, the parent itself is stored and its insides are no longer run; so are modules
without units that come before. Of the stored outputs only those are kept that something still to come depends on;
placeholders stand for the others.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..network.dataflow import is_closed, live_modules
from ..network.structure import Structure
from .activation_store import ActivationStore
from .calibration_set import CalibrationSet
from .placeholders import Placeholders, holds_placeholder, zeros
from .recording import Recording, UnitCall, UnitRecord

log = logging.getLogger(__name__)

Observe = Callable[[int, UnitCall, Any], None]


class CalledAgainError(RuntimeError):
    """A batch calls a module more often than the first batch did, so that stored outputs cannot answer for it.

    Example:
        See ``Replay``.
    """


class NotReachedError(RuntimeError):
    """A batch calls a module less often than the first batch did, as one of several experts: it cannot be looked at by
    itself.

    Example:
        See ``Replay``.
    """


class _ReachedUnit(BaseException):
    """Ends a pass; not an ``Exception``, so that no ``except`` clause of the user's model holds it back."""


@dataclass
class Replay:
    """One stream (float or quantized) of the calibration set through a model.

    Args:
        model: Model in eval mode.
        structure: Its observed structure.
        calibration: Calibration batches.
        units: Names of the modules that will be asked for, in this order, none inside another.
        store: Store of the outputs.
        to_end: Whether ``run`` will be called, which needs what the model's own output depends on as well.

    Example:
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.ones(3, 2))
        >>> structure = record(model, lambda: calibration.run(0))
        >>> replay = Replay(model, structure, calibration, ["0", "1"])
        >>> first = replay.record("0")
        >>> replay.finish("0", first.outputs)
        >>> replay.record("1", keep_inputs=True).inputs[0].args[0].shape
        torch.Size([3, 2])
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
    # None once the model has turned out to need values of what nothing depends on.
    _placeholders: Placeholders | None = field(default_factory=Placeholders)

    def calls(self, unit: str) -> int:
        """How often the model calls the unit in one batch."""
        return len(self.structure.calls_of[unit])

    def recording(self, unit: str, channels_last: bool = False) -> Recording:
        """An empty recording with room for each call of the unit in each batch."""
        return Recording(self.store, self.calls(unit) * len(self.calibration), channels_last)

    def capture(self, unit: str) -> Iterator[tuple[int, UnitCall]]:
        """The arguments of each call of a unit, call by call, each with the index of its batch.

        Stored outputs stand in for everything finished. A module that is called several times is followed to its last
        call, with what lies between computing as it is now.

        Args:
            unit: Name of the unit.

        Raises:
            NotReachedError: If a batch does not reach the unit.
        """
        calls, batches = self.calls(unit), len(self.calibration)
        promoted = {name: Recording(self.store, batches) for name in self._to_store(unit)}
        for index in range(batches):
            lengths = {name: len(outputs) for name, outputs in promoted.items()}
            run = partial(self._capture_batch, index, unit, calls, promoted, lengths)
            try:
                captured = self._with_placeholders(run)
            except NotReachedError:
                for outputs in promoted.values():
                    outputs.forget()
                raise
            for call in captured:
                yield index, call
        for name, outputs in promoted.items():
            # Not those that a batch left out, or that nothing depends on.
            if len(outputs) == batches:
                self._store(name, outputs)
            else:
                outputs.forget()

    def outputs(self, unit: str) -> Iterator[Any]:
        """The output of each call of a unit, one by one, of which none is kept.

        Args:
            unit: Name of the unit.

        Raises:
            NotReachedError: If a batch does not reach the unit.
        """
        module = self.model.get_submodule(unit)
        for _, call in self.capture(unit):
            with torch.no_grad():
                output = module(*call.args, **call.kwargs)
            yield output

    def record(
        self,
        unit: str,
        keep_inputs: bool = False,
        keep_outputs: bool = True,
        channels_last: bool = False,
        each: Observe | None = None,
    ) -> UnitRecord:
        """Record the inputs and the outputs of a unit at all its calls, over all batches.

        Args:
            unit: Name of the unit.
            keep_inputs: Whether its inputs are kept.
            keep_outputs: Whether the unit is run, as the model is now, and its outputs are kept.
            channels_last: Whether tensors of four dimensions are kept in the channels-last memory format.
            each: ``each(batch_index, call, output)`` is called after each run of the unit; it needs ``keep_outputs``.

        Returns:
            The recordings.

        Raises:
            NotReachedError: If a batch does not reach the unit.
        """
        module = self.model.get_submodule(unit)
        inputs = self.recording(unit, channels_last) if keep_inputs else None
        outputs = self.recording(unit, channels_last) if keep_outputs else None
        try:
            for index, call in self.capture(unit):
                # Kept first, since the unit may change its arguments in place.
                if inputs is not None:
                    inputs.append(call)
                if outputs is not None:
                    with torch.no_grad():
                        output = module(*call.args, **call.kwargs)
                        if each is not None:
                            each(index, call, output)
                    outputs.append(output)
        except NotReachedError:
            for recording in (inputs, outputs):
                if recording is not None:
                    recording.forget()
            raise
        return UnitRecord(inputs, outputs)

    @torch.no_grad()
    def record_again(self, unit: str, inputs: Recording, channels_last: bool = False) -> Recording:
        """Outputs of a unit, as the model is now, for inputs that were recorded before.

        Args:
            unit: Name of the unit.
            inputs: Recorded inputs.
            channels_last: See ``record``.
        """
        module = self.model.get_submodule(unit)
        outputs = self.recording(unit, channels_last)
        for call in inputs:
            outputs.append(module(*call.args, **call.kwargs))
        return outputs

    @torch.no_grad()
    def run(self, index: int) -> Any:
        """Pass batch ``index`` through the whole model (``to_end`` only), and return the model's output.

        Everything finished answers with its stored outputs.
        """

        def run() -> Any:
            with ExitStack() as stack:
                self._answer(stack, index)
                return self.calibration.run(index)

        return self._with_placeholders(run)

    def _with_placeholders(self, run: Callable[[], Any]) -> Any:
        """What ``run`` returns with placeholders where nothing depends on the values; with zeros if the model needs
        some values after all."""
        if self._placeholders is not None:
            try:
                with self._placeholders.not_kept(self.model):
                    found = run()
                if not holds_placeholder(found):
                    return found
                reason = "something to come reads them"
            except NotReachedError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            self._placeholders = None
            log.debug("Replay goes on with zeros in the place of placeholders: %s.", reason)
        return run()

    def forget(self) -> None:
        """Free everything that is stored, at the end of the replay."""
        for outputs in self._stored.values():
            outputs.forget()
        self._stored.clear()

    def finish(self, unit: str, outputs: Recording) -> None:
        """From now on, let ``unit`` answer with ``outputs`` (its output at each call, batch by batch).

        What nothing to come depends on is freed; ``outputs`` itself only when the next unit is finished.

        Args:
            unit: Name of the unit.
            outputs: Its outputs.
        """
        self._finished.add(unit)
        if self.calls(unit) == 1:
            self._store(unit, outputs)
        else:
            # It will compute again, wherever it is called.
            outputs.forget()
        pending = [name for name in self.units if not any(_is_inside(name, stored) for stored in self._stored)]
        live = live_modules(self.structure, list(self._stored), pending, self.to_end) | {unit}
        for name, stored in self._stored.items():
            if name not in live:
                stored.forget()

    def _store(self, name: str, outputs: Recording) -> None:
        self._stored[name] = outputs
        for inner in [other for other in self._stored if other != name and _is_inside(other, name)]:
            self._stored.pop(inner).forget()

    @torch.no_grad()
    def _capture_batch(
        self, index: int, unit: str, calls: int, promoted: dict[str, Recording], lengths: dict[str, int]
    ) -> list[UnitCall]:
        captured: list[UnitCall] = []
        for name, outputs in promoted.items():
            # Without what an attempt that failed has left.
            outputs.cut(lengths[name])

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            copy = Tensor.clone if calls > 1 else Tensor.detach
            call = UnitCall(args, kwargs)
            captured.append(tree_map(lambda leaf: copy(leaf) if isinstance(leaf, Tensor) else leaf, call))
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
        raise NotReachedError(
            f"calibration batch {index} calls it {len(captured)} times, the first batch {calls} times (larger batches "
            "may reach it alike)"
        )

    def _answer(self, stack: ExitStack, index: int) -> None:
        """Within ``stack``, everything stored answers for batch ``index``."""
        for name, stored in self._stored.items():
            make = zeros if self._placeholders is None else self._placeholders.like
            stack.enter_context(_answering(self.model.get_submodule(name), partial(stored.read, index, make), index))

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
            # One that reads nothing gives a weight, which would be stored once for each batch.
            and calls[0].reads
            and self._is_closed(name)
        ]
        return [name for name in names if not any(_is_inside(name, other) and name != other for other in names)]

    def _is_closed(self, name: str) -> bool:
        if name not in self._closed:
            self._closed[name] = is_closed(self.structure, name)
        return self._closed[name]


def _is_inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _keep_in(outputs: Recording) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if not holds_placeholder(output):
            outputs.append(output)

    return keep


@contextmanager
def _answering(module: nn.Module, stored: Callable[[], Any], index: int) -> Iterator[None]:
    """Inside, calling ``module`` gives what is stored of its output for batch ``index``, and computes nothing."""
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
        return stored()

    module.forward = answer
    with ExitStack() as stack:
        _bypass_quantizers(stack, module)
        try:
            yield
        finally:
            if had is None:
                del module.forward
            else:
                module.forward = had


def _bypass_quantizers(stack: ExitStack, module: nn.Module) -> None:
    """Within ``stack``, a layer's own quantizers are disabled while the layer is being called, and only then.

    A quantizer may be shared with a layer that does compute, so it cannot be disabled for the whole pass.
    """
    inputs = getattr(module, "input_quantizers", None)
    output = getattr(module, "output_quantizer", None)
    quantizers = [*(inputs.values() if isinstance(inputs, nn.ModuleDict) else ()), *filter(None, (output,))]
    enabled = [quantizer.enabled for quantizer in quantizers]
    if not any(enabled):
        return

    def disable(module: nn.Module, args: Any) -> None:
        for quantizer in quantizers:
            quantizer.enabled = False

    def restore(*_: Any) -> None:
        for quantizer, was in zip(quantizers, enabled, strict=True):
            quantizer.enabled = was

    stack.callback(restore)
    stack.callback(module.register_forward_pre_hook(disable, prepend=True).remove)
    stack.callback(module.register_forward_hook(restore).remove)
