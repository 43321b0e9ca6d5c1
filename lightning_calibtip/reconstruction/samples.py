"""The samples that one unit is reconstructed on: inputs and float targets, drawn in mini-batches."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_map, tree_unflatten

from ..calibration.activation_store import TensorSeries
from ..calibration.recording import Recording
from ..calibration.replay import UnitCall


@dataclass(frozen=True)
class Draw:
    """Some samples of a unit.

    Args:
        call: Its arguments, as the model in work gives them.
        target: The float unit's output.
        float_call: Its arguments in the float model, where they are wanted too.
        importance: Of each element of the output's floating-point tensors, where they are not equally important.
    """

    call: UnitCall
    target: Any
    float_call: UnitCall | None
    importance: list[Tensor] | None


class UnitSamples:
    """Inputs and targets of a unit over the calibration set.

    Every tensor that has the samples along its first dimension is drawn from by rows; what is the same for all (masks
    that broadcast, flags) is kept once. Where calls do not fit together (sequences of different lengths), each call
    stays whole and counts as one sample.

    Args:
        inputs: Arguments of each call, as pairs ``(args, kwargs)``.
        targets: Float output of each call.
        float_inputs: Arguments of each call in the float model.
        importance: Weights of the output's elements, a list of tensors for each call.
        shares: Whether a tensor argument that never changes is the same for all samples even if it is as long as each
            batch; otherwise it is drawn from by rows too.
        contiguous: Whether tensors are drawn contiguous, in whatever memory format they are kept.
        whole: Keep each call whole, for units that do not have the samples along the first dimension.

    Raises:
        ValueError: If the calls' arguments are nested differently.
    """

    def __init__(
        self,
        inputs: Recording,
        targets: Recording,
        float_inputs: Recording | None = None,
        importance: Recording | None = None,
        shares: bool = True,
        contiguous: bool = False,
        whole: bool = False,
    ) -> None:
        self._contiguous = contiguous
        if not inputs.nested_alike:
            raise ValueError("the unit is called with differently nested arguments in different batches")
        self._recordings = (inputs, targets, float_inputs, importance)
        self._tables: list[_Table | None] = []
        lengths, repeated = ([], False) if whole else _lengths(targets)
        for recording in self._recordings if lengths else ():
            whole_constants = shares and not repeated and (recording is inputs or recording is float_inputs)
            table = None if recording is None else _table(recording, lengths, whole_constants)
            if table is None and recording is not None:
                lengths = []
                break
            self._tables.append(table)
        self.whole = not lengths
        self.count = sum(lengths) or len(inputs)

    def take(self, index: Tensor) -> Draw:
        """The samples at ``index`` (int64, shape (n,)) as one call; of whole calls, the first of ``index``."""
        values: list[Any]
        if self.whole:
            values = [None if recording is None else recording[int(index[0])] for recording in self._recordings]
        else:
            values = [None if table is None else table.take(index) for table in self._tables]
        if self._contiguous:
            values = [tree_map(_contiguous, value) for value in values]
        inputs, target, float_inputs, importance = values
        float_call = None if float_inputs is None else UnitCall(*float_inputs)
        return Draw(UnitCall(*inputs), target, float_call, importance)


@dataclass(frozen=True)
class _Table:
    """A recording seen by samples: each column is drawn from by rows, or the same for all."""

    columns: list[Any]
    spec: TreeSpec

    def take(self, index: Tensor) -> Any:
        return tree_unflatten([_drawn(column, index) for column in self.columns], self.spec)


def _drawn(column: Any, index: Tensor) -> Any:
    """Fresh tensors, for a unit may change its arguments, and the error is computed in the target's place."""
    if isinstance(column, TensorSeries):
        return column.rows(index)
    return column.clone() if isinstance(column, Tensor) else column


def _contiguous(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


def _lengths(targets: Recording) -> tuple[list[int], bool]:
    """Samples of each call, which is the length of the first output tensor, and whether all calls gave the same; no
    lengths if there is no such tensor."""
    found = targets.columns()
    series = next((column for column in found[0] if isinstance(column, TensorSeries)), None) if found else None
    if series is None or not series.aligned:
        return [], False
    return [shape[0] for shape in series.shapes], series.constant


def _table(recording: Recording, lengths: list[int], shares_constants: bool) -> _Table | None:
    """The recording by samples, or None if a tensor in it has neither a row for each sample nor the same value always.

    Args:
        recording: All calls.
        lengths: Samples of each.
        shares_constants: Whether a tensor that never changes is kept whole even if it is as long as each batch.
    """
    found = recording.columns()
    if found is None:
        return None
    columns, spec = found
    table = []
    for column in columns:
        if isinstance(column, TensorSeries):
            by_rows = column.aligned and [shape[0] for shape in column.shapes] == lengths
            if (column.constant and len(column) > 1 and shares_constants) or (column.constant and not by_rows):
                column = column[0]
            elif not by_rows:
                return None
        table.append(column)
    return _Table(table, spec)
