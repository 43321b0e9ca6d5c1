"""Placeholders: tensors with a shape and no memory, for what is computed on the way and nothing depends on."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

# Smaller tensors are zeros: computing with those takes less time than keeping account of placeholders.
_SMALLEST_BYTES = 4_000_000


class Placeholders:
    """Makes placeholders, with which everything can be computed that needs no values.

    What needs some (a branch, a conversion to NumPy) raises an exception.

    Example:
        >>> made = Placeholders().like(torch.Size([1000, 2000]), torch.float32, torch.device("cpu"))
        >>> holds_placeholder((torch.ones(1), {"x": torch.relu(made) + 1}))
        True
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def like(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A placeholder for a tensor; zeros for a small one."""
        if shape.numel() * dtype.itemsize < _SMALLEST_BYTES:
            return zeros(shape, dtype, device)
        with self._mode:
            return torch.empty(shape, dtype=dtype, device=device)


def zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros, in the place of a placeholder.

    Example:
        >>> zeros(torch.Size([2]), torch.float32, torch.device("cpu"))
        tensor([0., 0.])
    """
    return torch.zeros(shape, dtype=dtype, device=device)


def holds_placeholder(value: Any) -> bool:
    """Whether a nested value has a placeholder among its tensors."""
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(value))
