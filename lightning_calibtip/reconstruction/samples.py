"""The samples that one unit is reconstructed on: inputs and float targets, drawn in mini-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..calibration.replay import UnitCall

Target = list[Tensor]


@dataclass
class UnitSamples:
    """Inputs and targets of all calibration samples.

    Every tensor that has the samples along its first dimension is one long tensor; what is the same for all (masks that
    broadcast, flags) is kept once. Where calls do not fit together (sequences of different lengths), each call stays
    whole and counts as one sample.
    """

    _spec: TreeSpec
    _leaves: list[Any]
    _sliced: list[bool]
    _whole: list[list[Any]] | None
    count: int

    @property
    def whole(self) -> bool:
        """Whether each call counts as one sample."""
        return self._whole is not None

    @classmethod
    def join(cls, calls: Sequence[UnitCall], targets: Sequence[Target], whole: bool = False) -> "UnitSamples":
        """Put the calls of all batches together.

        Args:
            calls: Arguments of each call.
            targets: Float output tensors of each call.
            whole: Keep each call whole, for units that do not have the samples along the first dimension.

        Raises:
            ValueError: If the calls' arguments are nested differently.
        """
        flat = [tree_flatten((c.args, c.kwargs, t)) for c, t in zip(calls, targets, strict=True)]
        rows, spec = [leaves for leaves, _ in flat], flat[0][1]
        lengths = [target[0].shape[0] if target[0].dim() else 0 for target in targets]
        same_tree = all(other == spec for _, other in flat)
        if same_tree and all(lengths) and not whole:
            columns = [_join_column(list(column), lengths) for column in zip(*rows, strict=True)]
            if all(column is not None for column in columns):
                joined = [column[0] for column in columns if column is not None]
                sliced = [column[1] for column in columns if column is not None]
                return cls(spec, joined, sliced, None, sum(lengths))
        if not same_tree:
            raise ValueError("the unit is called with differently nested arguments in different batches")
        return cls(spec, [], [], rows, len(rows))

    def take(self, index: Tensor) -> tuple[UnitCall, Target]:
        """The samples at ``index`` (int64, shape (n,)) as one call and its targets; of whole calls, the first of
        ``index``."""
        if self._whole is not None:
            leaves = self._whole[int(index[0])]
        else:
            leaves = [
                leaf.index_select(0, index.to(leaf.device)) if sliced else leaf
                for leaf, sliced in zip(self._leaves, self._sliced, strict=True)
            ]
        args, kwargs, target = tree_unflatten(leaves, self._spec)
        return UnitCall(args, kwargs), target


def _join_column(column: list[Any], lengths: list[int]) -> tuple[Any, bool] | None:
    """One argument over all calls: joined along the samples, or kept once if it is the same in all, or None if neither
    fits."""
    first = column[0]
    if not isinstance(first, Tensor):
        return (first, False) if all(type(other) is type(first) and other == first for other in column) else None
    if len(column) > 1 and all(leaf.shape == first.shape and torch.equal(leaf, first) for leaf in column):
        return first, False
    pairs = zip(column, lengths, strict=True)
    if all(leaf.dim() and leaf.shape[0] == n and leaf.shape[1:] == first.shape[1:] for leaf, n in pairs):
        return torch.cat(column), True
    return (first, False) if len(column) == 1 else None
