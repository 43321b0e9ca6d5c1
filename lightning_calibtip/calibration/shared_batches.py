"""Calibration batches of several processes: all of them see all."""

from typing import Any

from torch.utils._pytree import tree_leaves

from .. import ranks
from ..files.digest import digest


def batches_of_all_ranks(batch: Any) -> list[Any]:
    """What all ranks have got as their next batch, in the order of ranks, with tensors in the CPU's memory; the batch
    itself, if all have the same.

    Args:
        batch: Next batch of this rank.

    Example:
        >>> batches_of_all_ranks("batch")
        ['batch']
    """
    return [batch] if _is_same_everywhere(batch) else ranks.from_all(ranks.to_cpu(batch))


def batches_of_first(batches: list[Any]) -> list[Any]:
    """The batches of rank 0, with tensors in the CPU's memory; the batches themselves, if all ranks have the same.

    Args:
        batches: Batches of this rank.

    Example:
        >>> batches_of_first(["batch"])
        ['batch']
    """
    return batches if _is_same_everywhere(batches) else ranks.from_first(ranks.to_cpu(batches))


def _is_same_everywhere(value: Any) -> bool:
    return ranks.rank_count() == 1 or len(set(ranks.from_all(digest(tree_leaves(value))))) == 1
