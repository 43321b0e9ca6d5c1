"""The processes of a distributed run, as far as quantization is concerned: who does what, and what all must know."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

# Whether the processes of the group work together, by contexts; a process group alone says nothing: one of its
# processes may quantize a model by itself.
_together = [False]


def rank_count() -> int:
    """Number of processes that work together; 1 but inside of ``together``.

    Example:
        >>> rank_count()
        1
    """
    return dist.get_world_size() if _together[-1] and dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0 on.

    Example:
        >>> rank()
        0
    """
    return dist.get_rank() if rank_count() > 1 else 0


@contextmanager
def together(enabled: bool = True) -> Iterator[None]:
    """Inside, all processes of the group do the same, and what follows is one run of all of them.

    Args:
        enabled: Whether they do; otherwise nothing changes.

    Example:
        >>> with together():
        ...     rank_count()
        1
    """
    _together.append(_together[-1] or enabled)
    try:
        yield
    finally:
        _together.pop()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process asks nothing of the others, and they nothing of it.

    Example:
        >>> with alone():
        ...     rank_count()
        1
    """
    _together.append(False)
    try:
        yield
    finally:
        _together.pop()


def from_first(value: T) -> T:
    """What rank 0 gives for ``value``; its tensors must be in the CPU's memory. All ranks must call it.

    Args:
        value: Anything that can be pickled; of other ranks it is not looked at.

    Example:
        >>> from_first("plan")
        'plan'
    """
    if rank_count() == 1:
        return value
    shared = [value if rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    found: T = shared[0]  # type: ignore[assignment]
    return found


def from_all(value: T) -> list[T]:
    """What each rank gives for ``value``, in the order of ranks. All ranks must call it.

    Args:
        value: Anything that can be pickled; its tensors must be in the CPU's memory.

    Example:
        >>> from_all(1)
        [1]
    """
    if rank_count() == 1:
        return [value]
    found: list[Any] = [None] * rank_count()
    dist.all_gather_object(found, value)
    return found


def share(tasks: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """What some work gives for each of some tasks, every rank doing its share of them. All ranks must call it with the
    same tasks.

    Args:
        tasks: The tasks.
        work: Called with a task; its tensors come back in the CPU's memory where several ranks work.

    Example:
        >>> share([1, 2, 3], lambda task: task**2)
        [1, 4, 9]
    """
    if rank_count() == 1:
        return [work(task) for task in tasks]
    mine = [to_cpu(work(task)) for task in tasks[rank() :: rank_count()]]
    parts = from_all(mine)
    return [parts[position % rank_count()][position // rank_count()] for position in range(len(tasks))]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors, in place, by their sums over all ranks. All ranks must call it with tensors of the same shapes.

    Example:
        >>> gradient = torch.ones(2)
        >>> add_up([gradient])
        >>> gradient
        tensor([1., 1.])
    """
    if rank_count() == 1 or not tensors:
        return
    # One message instead of many.
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def deal(costs: Sequence[float]) -> list[int]:
    """The rank that does each of some tasks, so that all ranks end about at the same time: the dearest task first, each
    to the rank that has least to do so far.

    Args:
        costs: What each task costs, in any unit.

    Example:
        >>> deal([3.0, 1.0, 2.0])
        [0, 0, 0]
    """
    return deal_among(costs, rank_count())


def deal_among(costs: Sequence[float], count: int) -> list[int]:
    """The same for a number of ranks.

    Example:
        >>> deal_among([3.0, 1.0, 2.0], 2)
        [0, 1, 1]
    """
    loads, owners = [0.0] * count, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = min(range(count), key=lambda each: loads[each])
        loads[owners[task]] += costs[task]
    return owners


def to_cpu(value: Any) -> Any:
    """The same nested value with its tensors in the CPU's memory.

    Example:
        >>> to_cpu({"a": (torch.ones(1), 2)})
        {'a': (tensor([1.]), 2)}
    """
    from torch.utils._pytree import tree_map

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().cpu()
        # A batch that is an object, such as a graph, which would move itself.
        return copy(leaf).cpu() if callable(getattr(leaf, "cpu", None)) and hasattr(leaf, "to_dict") else leaf

    return tree_map(move, value)
