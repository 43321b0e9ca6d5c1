"""Recordings: what a module was given, or returned, at each of its calls, kept in an activation store."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .activation_store import ActivationStore, TensorSeries
from .placeholders import zeros


class UnitCall(NamedTuple):
    """Arguments of one call of a module, without gradients.

    Being a tuple, it is itself a nested value that a ``Recording`` keeps and that ``tree_map`` goes through.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Example:
        >>> UnitCall((1, 2), {"scale": 3}).kwargs["scale"]
        3
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class UnitRecord(NamedTuple):
    """Recordings of all calls of one unit over the calibration set.

    Args:
        inputs: ``UnitCall`` of each call; None if inputs were not to be kept.
        outputs: Output of each call; None if outputs were not to be kept.

    Example:
        See ``Replay.record``.
    """

    inputs: "Recording | None"
    outputs: "Recording | None"


class _Kept(NamedTuple):
    """Stands for a tensor that is kept in a series."""

    series: TensorSeries
    position: int


@dataclass(frozen=True, eq=False)
class _Sparse:
    """Stands for a sparse tensor, such as the adjacency of a graph, which is kept as it is."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Sparse) and other.tensor is self.tensor

    __hash__ = object.__hash__


class Recording:
    """List of nested values whose tensors, but sparse ones, are kept in an activation store.

    Args:
        store: Store of the tensors.
        length: Number of values to come.
        channels_last: Whether tensors of four dimensions are kept in the channels-last memory format.

    Example:
        >>> import torch
        >>> recording = Recording(ActivationStore(), 1)
        >>> recording.append(UnitCall((torch.ones(2),), {"flag": True}))
        >>> recording[0]
        UnitCall(args=(tensor([1., 1.]),), kwargs={'flag': True})
    """

    def __init__(self, store: ActivationStore, length: int, channels_last: bool = False) -> None:
        self._store, self._length, self._channels_last = store, length, channels_last
        self._values: list[tuple[TreeSpec, list[Any]]] = []
        # By position in the value, type and device; most recordings have one for each position.
        self._series: dict[tuple[Any, ...], TensorSeries] = {}
        self._forgotten = False

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))

    def append(self, value: Any) -> None:
        """Keep a copy of a value."""
        leaves, spec = tree_flatten(value)
        kept = []
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
                leaf = _Sparse(leaf)
            elif isinstance(leaf, Tensor):
                key = (position, leaf.dtype, leaf.device)
                if key not in self._series:
                    self._series[key] = self._store.series(self._length, self._channels_last)
                self._series[key].append(leaf)
                leaf = _Kept(self._series[key], len(self._series[key]) - 1)
            kept.append(leaf)
        self._values.append((spec, kept))

    def __getitem__(self, position: int) -> Any:
        """A fresh copy of a value, since the caller may change it in place; zeros for what was forgotten."""
        return self.read(position, zeros)

    def read(self, position: int, make: Callable[[torch.Size, torch.dtype, torch.device], Tensor]) -> Any:
        """A fresh copy of a value; what ``make`` makes of a tensor's shape, type and device for what was forgotten.

        Args:
            position: Position of the value.
            make: Makes a tensor.
        """
        spec, leaves = self._values[position]
        read = partial(TensorSeries.like, make=make) if self._forgotten else TensorSeries.__getitem__
        return tree_unflatten([read(*leaf) if isinstance(leaf, _Kept) else _as_given(leaf) for leaf in leaves], spec)

    def views(self) -> Iterator[Any]:
        """The values one by one, whose tensors must not be changed, nor used later: most are not copied."""
        for spec, leaves in self._values:
            yield tree_unflatten(
                [leaf.series.view(leaf.position) if isinstance(leaf, _Kept) else _as_given(leaf) for leaf in leaves],
                spec,
            )

    def shapes(self) -> list[list[torch.Size]]:
        """Shapes of the tensors of each value, in the order of its nesting."""
        return [
            [leaf.series.shapes[leaf.position] for leaf in leaves if isinstance(leaf, _Kept)]
            for _, leaves in self._values
        ]

    def cut(self, length: int) -> None:
        """Forget the values from ``length`` on."""
        del self._values[length:]

    @property
    def nested_alike(self) -> bool:
        """Whether all values have the same nesting."""
        return all(spec == self._values[0][0] for spec, _ in self._values)

    def columns(self) -> tuple[list[Any], TreeSpec] | None:
        """The values column by column, and their nesting; None if the values do not agree.

        A column is one position in the nesting: the ``TensorSeries`` of all values, or the object that is at this
        position in all of them.
        """
        if not self.nested_alike:
            return None
        columns = []
        for column in zip(*(leaves for _, leaves in self._values), strict=True):
            first = column[0].series if isinstance(column[0], _Kept) else column[0]
            others = [leaf.series if isinstance(leaf, _Kept) else leaf for leaf in column]
            if not all(other is first or (type(other) is type(first) and other == first) for other in others):
                return None
            columns.append(_as_given(first))
        return columns, self._values[0][0]

    def forget(self) -> None:
        """Free all tensors; from now on zeros of their shapes stand for them."""
        self._forgotten = True
        for series in self._series.values():
            series.free()


def _as_given(leaf: Any) -> Any:
    return leaf.tensor if isinstance(leaf, _Sparse) else leaf
