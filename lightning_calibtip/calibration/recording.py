"""What a module was given, or gave, at each of its calls: nested tensors kept in an activation store."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .activation_store import ActivationStore, TensorSeries


class _Kept(NamedTuple):
    """Stands for a tensor that lies in a series."""

    series: TensorSeries
    position: int


class Recording:
    """A list of nested values, whose tensors lie in a store.

    Args:
        store: Where the tensors are kept.
        length: How many values are to come.
        channels_last: See ``TensorSeries``.
    """

    def __init__(self, store: ActivationStore, length: int, channels_last: bool = False) -> None:
        self._store, self._length, self._channels_last = store, length, channels_last
        self._values: list[tuple[TreeSpec, list[Any]]] = []
        # By position in the value, type and device; most recordings have one for each position.
        self._series: dict[tuple[Any, ...], TensorSeries] = {}
        self._forgotten = False

    def __len__(self) -> int:
        return len(self._values)

    def append(self, value: Any) -> None:
        """Keep a copy of a value."""
        leaves, spec = tree_flatten(value)
        kept = []
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                key = (position, leaf.dtype, leaf.device)
                if key not in self._series:
                    self._series[key] = self._store.series(self._length, self._channels_last)
                self._series[key].append(leaf)
                leaf = _Kept(self._series[key], len(self._series[key]) - 1)
            kept.append(leaf)
        self._values.append((spec, kept))

    def __getitem__(self, position: int) -> Any:
        """A fresh copy of a value, for what follows may change it in place; zeros for what was forgotten."""
        spec, leaves = self._values[position]
        read = TensorSeries.zeros if self._forgotten else TensorSeries.__getitem__
        return tree_unflatten([read(*leaf) if isinstance(leaf, _Kept) else leaf for leaf in leaves], spec)

    @property
    def nested_alike(self) -> bool:
        """Whether all values have the same nesting."""
        return all(spec == self._values[0][0] for spec, _ in self._values)

    def columns(self) -> tuple[list[Any], TreeSpec] | None:
        """For each position in the nesting the ``TensorSeries`` of all values, or what is there instead in all of them;
        and the nesting. None if the values do not agree."""
        if not self.nested_alike:
            return None
        columns = []
        for column in zip(*(leaves for _, leaves in self._values), strict=True):
            first = column[0].series if isinstance(column[0], _Kept) else column[0]
            others = [leaf.series if isinstance(leaf, _Kept) else leaf for leaf in column]
            if not all(other is first or (type(other) is type(first) and other == first) for other in others):
                return None
            columns.append(first)
        return columns, self._values[0][0]

    def forget(self) -> None:
        """Free all tensors; from now on zeros of their shapes stand for them."""
        self._forgotten = True
        for series in self._series.values():
            series.free()
