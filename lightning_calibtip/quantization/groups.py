"""Weights in groups: the rows that share one scale each, and back."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def groups_per_channel(shape: Sequence[int], axis: int, size: int) -> int:
    """Number of groups of one channel; the last one may be shorter than the others.

    Example:
        >>> groups_per_channel((3, 70), axis=0, size=32)
        3
    """
    return math.ceil(math.prod(shape) // shape[axis] / size)


def to_groups(x: Tensor, axis: int, size: int) -> Tensor:
    """Arrange a weight in rows of one group each.

    Args:
        x: Weight of any shape.
        axis: Dimension that runs over channels; the others are flattened in their order.
        size: Number of elements of a group.

    Returns:
        Shape (channels * groups, size), the groups of a channel one after the other; a shorter last group is filled up
        with zeros, which every range contains and every quantization keeps.

    Example:
        >>> to_groups(torch.arange(6.0).view(2, 3), axis=0, size=2)
        tensor([[0., 1.],
                [2., 0.],
                [3., 4.],
                [5., 0.]])
    """
    rows = x.movedim(axis, 0).flatten(1)
    missing = -rows.shape[1] % size
    return (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).reshape(-1, size)


def from_groups(rows: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Undo ``to_groups``.

    Args:
        rows: Shape (channels * groups, size).
        shape: Shape of the weight.
        axis: Its dimension that runs over channels.

    Example:
        >>> weight = torch.arange(24.0).view(2, 3, 4)
        >>> from_groups(to_groups(weight, 1, 5), weight.shape, 1).equal(weight)
        True
    """
    others = [length for dim, length in enumerate(shape) if dim != axis]
    return rows.reshape(shape[axis], -1)[:, : math.prod(others)].reshape(shape[axis], *others).movedim(0, axis)
