"""What a batch holds, of whatever class it is: nested containers, mappings, and objects that say what they hold."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

# What an object with ``to_dict`` (a ``Data`` or ``Batch`` of PyTorch Geometric) calls its targets, which of its nodes
# are for training, and how many samples it has.
_TARGETS, _MASK, _NODES, _GRAPHS, _SEEDS = "y", "train_mask", "num_nodes", "num_graphs", "batch_size"


def content_of(value: Any) -> dict[Any, Any] | None:
    """What a mapping of any class, or an object with a method ``to_dict()``, holds; None of anything else.

    Args:
        value: Any value.

    Example:
        >>> from collections import UserDict
        >>> content_of(UserDict(a=1)), content_of([1]) is None
        ({'a': 1}, True)
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Tensor | nn.Module | type) or not callable(getattr(value, "to_dict", None)):
        return None
    try:
        content = value.to_dict()
    except Exception:
        # It needs arguments, or is the user's own for something else.
        return None
    return dict(content) if isinstance(content, Mapping) else None


def is_object(batch: Any) -> bool:
    """Whether a batch is an object that says by ``to_dict()`` what it holds, and no mapping.

    Example:
        >>> is_object({"x": 1})
        False
    """
    return not isinstance(batch, Mapping) and content_of(batch) is not None


def plain(batch: Any, targets: bool = True, within: tuple[Any, ...] = ()) -> Any:
    """A batch in which mappings of any class, and objects with ``to_dict()``, are dicts, whose parts torch finds.

    Args:
        batch: Any batch; what is neither is returned as it is, and so is what lies in containers of torch's.
        targets: Whether what an object calls its targets (``y``) is among its parts.
        within: What holds the batch; something that holds itself is not taken apart again.

    Example:
        >>> from collections import UserDict
        >>> plain((UserDict(a=1), 2))
        ({'a': 1}, 2)
    """
    content = None if any(batch is holder for holder in within) else content_of(batch)
    if content is None:
        return tree_map(lambda leaf: leaf if leaf is batch else plain(leaf, targets, within), batch)
    if not targets and is_object(batch):
        content.pop(_TARGETS, None)
    return {key: plain(value, targets, (*within, batch)) for key, value in content.items()}


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order.

    Example:
        >>> tensors_in({"x": torch.zeros(1), "name": "a"})
        [tensor([0.])]
    """
    return [leaf for leaf in tree_leaves(plain(batch)) if isinstance(leaf, Tensor)]


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor, dense or sparse, is NaN or infinity.

    Example:
        >>> is_finite(torch.tensor([1.0])), is_finite(torch.tensor([float("nan")]).to_sparse())
        (True, False)
    """
    if tensor.layout == torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout != torch.strided:
        tensor = tensor.values()
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    # The ends are NaN where any value is. Without a tensor of bools this takes a fortieth of the time of isfinite.
    return all(math.isfinite(end) for end in torch.stack(torch.aminmax(tensor.detach())).tolist())


def batch_size(batch: Any) -> int:
    """Number of samples of a batch.

    Of an object that names its training nodes, or the nodes that it was sampled for, these are the samples; of one
    that joins graphs, the graphs; of another graph, its nodes. Of everything else it is the length of the first tensor
    that has dimensions; 1 if there is none.

    Args:
        batch: Any nesting of tensors.

    Example:
        >>> batch_size({"pixels": torch.zeros(4, 3)})
        4
    """
    counted = counted_rows(batch)
    if counted is not None:
        return int(counted.sum())
    if (graph := object_in(batch)) is not None:
        for name in (_GRAPHS, _NODES):
            if isinstance(own := getattr(graph, name, None), int):
                return own
    return next((len(leaf) for leaf in tensors_in(batch) if leaf.dim()), 1)


def counted_rows(batch: Any) -> Tensor | None:
    """Which rows of a batch count, where it is an object that says so: the nodes of a graph that are for training
    (``train_mask``), or that it was sampled for (the first ``batch_size`` ones).

    Args:
        batch: Any batch.

    Returns:
        Bool, shape (rows,); None if all count.

    Raises:
        ValueError: If the mask has several columns, one for each split.
    """
    batch = object_in(batch)
    if batch is None:
        return None
    mask, nodes = getattr(batch, _MASK, None), getattr(batch, _NODES, None)
    seeds = getattr(batch, _SEEDS, None)
    if isinstance(seeds, int) and isinstance(nodes, int) and not hasattr(batch, _GRAPHS):
        device = next((tensor.device for tensor in tensors_in(batch)), None)
        return torch.arange(nodes, device=device) < seeds
    if not isinstance(mask, Tensor):
        return None
    if mask.dtype not in (torch.bool, torch.uint8):
        raise ValueError(
            f"{_MASK} of the {type(batch).__name__} is {str(mask.dtype).removeprefix('torch.')}, and must be bool: "
            "give a mask of its nodes."
        )
    if mask.dim() != 1:
        raise ValueError(
            f"{_MASK} of the {type(batch).__name__} has the shape {tuple(mask.shape)}, a column for each split: choose "
            f"one, batch.{_MASK} = batch.{_MASK}[:, 0]."
        )
    return mask.bool()


def object_in(batch: Any) -> Any:
    """The object in a batch that is one, or in a tuple or list whose first element, or a mapping whose only value of
    this kind, is one; else None.

    Args:
        batch: Any batch.

    Example:
        >>> object_in((1, 2)) is None
        True
    """
    if isinstance(batch, Mapping):
        found = [value for value in batch.values() if is_object(value)]
        return found[0] if len(found) == 1 else None
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    return first if is_object(first) else None


def shallow_copy(batch: Any) -> Any:
    """A batch with other objects of the same tensors in the place of its objects, to which a model may give others.

    Args:
        batch: Any batch; what is no object is returned as it is.

    Example:
        >>> shallow_copy(1)
        1
    """
    return tree_map(lambda leaf: copy.copy(leaf) if is_object(leaf) else leaf, batch)


def is_graph(value: Any) -> bool:
    """Whether a value is a graph: an object, and no mapping, that knows the number of its nodes.

    Args:
        value: Any value.

    Example:
        >>> is_graph({"num_nodes": 3})
        False
    """
    return hasattr(type(value), _NODES) and is_object(value)
