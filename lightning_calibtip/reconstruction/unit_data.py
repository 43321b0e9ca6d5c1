"""The data set of one unit: inputs and float targets over the calibration set, drawn in mini-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map, tree_unflatten

from ..calibration.activation_store import TensorSeries
from ..calibration.recording import Recording, UnitCall
from ..network.message_passing import message_passing_layers
from .units import Unit

# Samples on which it is tried whether a unit can be run on a part of a batch, and the relative difference that other
# kernels for other batch sizes may make (mixing samples up makes one of about 1).
_ROWS_TRIED, _TOLERANCE = 8, 0.1


class MiniBatch(NamedTuple):
    """Some samples of a unit.

    Args:
        call: Arguments of the unit, as the model in work gives them.
        target: Output of the float unit.
        float_call: Arguments of the unit in the float model, where they are wanted too.
        importance: Weight of each element of the output's floating-point tensors, where they are not equally important.

    Example:
        See ``UnitDataset``.
    """

    call: UnitCall
    target: Any
    float_call: UnitCall | None
    importance: list[Tensor] | None


class UnitData(NamedTuple):
    """What is recorded of a unit over the calibration set.

    Args:
        inputs: ``UnitCall`` of each call.
        targets: Float output of each call.
        float_inputs: ``UnitCall`` of each call in the float model, where they are wanted too.
        importance: Weights of the output's elements, a list of tensors for each call, where they are not all alike.

    Example:
        See ``UnitDataset``.
    """

    inputs: Recording
    targets: Recording
    float_inputs: Recording | None = None
    importance: Recording | None = None


class UnitDataset:
    """Inputs and targets of a unit over the calibration set.

    Every tensor that has the samples along its first dimension is drawn from by rows; what is the same for all (masks
    that broadcast, flags) is kept once. Where calls do not fit together (sequences of different lengths), each call
    stays whole and counts as one sample.

    Args:
        inputs: ``UnitCall`` of each call.
        targets: Float output of each call.
        float_inputs: ``UnitCall`` of each call in the float model.
        importance: Weights of the output's elements, a list of tensors for each call.
        shares: Whether a tensor argument that never changes is the same for all samples even if it is as long as each
            batch; otherwise it is drawn from by rows too.
        contiguous: Whether tensors are drawn contiguous, in whatever memory format they are kept.
        whole: Whether each call is kept whole, for units that do not have the samples along the first dimension.

    Raises:
        ValueError: If the calls' arguments are nested differently.

    Example:
        >>> from lightning_calibtip.calibration.activation_store import ActivationStore
        >>> inputs, targets = (Recording(ActivationStore(), 1) for _ in range(2))
        >>> inputs.append(UnitCall((torch.tensor([[1.0], [2.0]]),), {}))
        >>> targets.append(torch.tensor([[3.0], [4.0]]))
        >>> batch = UnitDataset(inputs, targets).take(torch.tensor([1]))
        >>> batch.call.args[0], batch.target
        (tensor([[2.]]), tensor([[4.]]))
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
            raise ValueError("its calls differ in which arguments they give")
        # In the order of the fields of MiniBatch.
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

    def take(self, index: Tensor) -> MiniBatch:
        """The samples at ``index`` (int64, shape (n,)) as one call; of whole calls, the first of ``index``."""
        values: list[Any]
        if self.whole:
            values = [None if recording is None else recording[int(index[0])] for recording in self._recordings]
        else:
            values = [None if table is None else table.take(index) for table in self._tables]
        if self._contiguous:
            values = [tree_map(_contiguous, value) for value in values]
        return MiniBatch(*values)


class RowsOf(UnitDataset):
    """A data set of one sample, of whose outputs only some rows count.

    Args:
        dataset: The data set.
        chosen: ``chosen(counted)`` says which rows of an output count: bool, shape (rows,), as which of them have any
            weight.

    Example:
        See ``split_rows``.
    """

    def __init__(self, dataset: UnitDataset, chosen: Callable[[Tensor], Tensor]) -> None:
        self._dataset, self._chosen = dataset, chosen
        self.whole, self.count = dataset.whole, dataset.count
        # Of the one sample they are always the same.
        self._weights: list[Tensor] | None = None

    def take(self, index: Tensor) -> MiniBatch:
        """See ``UnitDataset``."""
        batch = self._dataset.take(index)
        if self._weights is None:
            self._weights = self._weights_of(batch)
        return batch._replace(importance=self._weights)

    def _weights_of(self, batch: MiniBatch) -> list[Tensor]:
        leaves = [leaf for leaf in tree_leaves(batch.target) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        weights = []
        for leaf, given in zip(leaves, batch.importance or repeat(None), strict=False):
            weight = torch.ones_like(leaf) if given is None else given
            if leaf.dim():
                counted = weight != 0
                chosen = self._chosen((counted.flatten(1).any(1) if counted.dim() > 1 else counted).cpu()).to(weight)
                weight = weight * chosen.view(-1, *[1] * (weight.dim() - 1))
            weights.append(weight)
        return weights


def split_rows(dataset: UnitDataset, share: float, generator: torch.Generator) -> tuple[UnitDataset, UnitDataset]:
    """Split a data set of one sample by the rows of its outputs, such as the nodes of a graph.

    Args:
        dataset: The data set.
        share: Share of the rows that is held out, above 0 and below 1; one row at least. An output of which only one
            row has any weight is not split.
        generator: Random generator of the choice.

    Returns:
        The same sample with the rows that are held out, and with the others.

    Example:
        >>> from lightning_calibtip.calibration.activation_store import ActivationStore
        >>> inputs, targets = (Recording(ActivationStore(), 1) for _ in range(2))
        >>> inputs.append(UnitCall((torch.ones(4, 1),), {}))
        >>> targets.append(torch.ones(4, 1))
        >>> dataset = UnitDataset(inputs, targets, whole=True)
        >>> held, others = split_rows(dataset, 0.25, torch.Generator().manual_seed(0))
        >>> [int(part.take(torch.tensor([0])).importance[0].sum()) for part in (held, others)]
        [1, 3]
    """
    found: dict[int, Tensor] = {}

    def held(counted: Tensor) -> Tensor:
        rows = counted.nonzero().flatten()
        if len(counted) not in found:
            chosen = rows[torch.randperm(len(rows), generator=generator)][: max(1, round(share * len(rows)))]
            found[len(counted)] = torch.zeros_like(counted).index_fill_(0, chosen, True)
        return found[len(counted)] if len(rows) > 1 else counted

    def others(counted: Tensor) -> Tensor:
        left = counted & ~held(counted)
        return left if bool(left.any()) else counted

    return RowsOf(dataset, held), RowsOf(dataset, others)


@dataclass(frozen=True)
class _Table:
    """A recording by samples: each column is drawn from by rows, or is the same for all."""

    columns: list[Any]
    spec: TreeSpec

    def take(self, index: Tensor) -> Any:
        return tree_unflatten([_drawn(column, index) for column in self.columns], self.spec)


def _drawn(column: Any, index: Tensor) -> Any:
    """Fresh tensors, since a unit may change its arguments, and the error is computed in the target's place."""
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
        recording: Values of all calls.
        lengths: Number of samples in each call.
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


def split_by_samples(unit: Unit, data: UnitData) -> UnitDataset:
    """The data set of a unit, split along the first dimension only if the unit gives the same on a part of them. Where
    it passes messages along the edges of a graph, that is not even tried: they name nodes that would not be there.

    Args:
        unit: The unit.
        data: What is recorded of it.

    Raises:
        ValueError: If the unit's calls differ in which arguments they give, or it returns no tensor of samples.

    Example:
        See ``UnitDataset``.
    """
    with torch.no_grad():
        outputs = unit.output_tensors(unit(data.inputs[0]))
    if not outputs or not outputs[0].dim():
        raise ValueError(f"{unit.name} returns no floating-point tensor of samples")
    if message_passing_layers(unit.module):
        return UnitDataset(*data, whole=True)
    # Rows of convolutions come channels-last, which code with views of its own may not take.
    for contiguous in (False, True) if unit.prefers_channels_last else (False,):
        for shares in (True, False):
            dataset = UnitDataset(*data, shares, contiguous)
            if not dataset.whole and _gives_the_same_by_rows(unit, dataset, outputs):
                return dataset
    return UnitDataset(*data, whole=True)


@torch.no_grad()
def _gives_the_same_by_rows(unit: Unit, dataset: UnitDataset, outputs: list[Tensor]) -> bool:
    """Whether some samples of the first call, drawn by rows, have the ``outputs`` that they have in the whole call."""
    count = len(outputs[0])
    rows = torch.arange(0, count, 2)[:_ROWS_TRIED]
    try:
        drawn = unit.output_tensors(unit(dataset.take(rows).call))
    except Exception:
        # The unit's own code, which does not take what it was tried with.
        return False
    for output, part in zip(outputs, drawn, strict=True):
        wanted = output[rows.to(output.device)] if output.dim() and len(output) == count else output
        if part.shape != wanted.shape or float((part - wanted).norm()) > _TOLERANCE * max(float(output.norm()), 1e-20):
            return False
    return True
