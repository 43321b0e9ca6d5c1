"""Placeholders: tensors with a shape and no memory, for intermediate values that nothing depends on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

# Smaller tensors are zeros: computing with those takes less time than keeping account of placeholders.
_SMALLEST_BYTES = 4_000_000


class PlaceholderKeptError(RuntimeError):
    """A module keeps a placeholder beyond the pass that it was made for.

    Example:
        See ``Placeholders``.
    """


class Placeholders:
    """Makes placeholders, with which everything can be computed that needs no values.

    What needs some (a branch, a conversion to NumPy) raises an exception.

    Example:
        >>> placeholders, model = Placeholders(), nn.Identity()
        >>> made = placeholders.like(torch.Size([1000, 2000]), torch.float32, torch.device("cpu"))
        >>> holds_placeholder((torch.ones(1), {"x": torch.relu(made) + 1}))
        True
        >>> with placeholders.not_kept(model):
        ...     model.last = placeholders.like(torch.Size([1000, 2000]), torch.float32, torch.device("cpu"))
        Traceback (most recent call last):
        lightning_calibtip.calibration.placeholders.PlaceholderKeptError: Identity keeps last.
        >>> hasattr(model, "last")
        False
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made = False

    def like(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A placeholder for a tensor; zeros for a small one."""
        if shape.numel() * dtype.itemsize < _SMALLEST_BYTES:
            return zeros(shape, dtype, device)
        self._made = True
        with self._mode:
            return torch.empty(shape, dtype=dtype, device=device)

    @contextmanager
    def not_kept(self, model: nn.Module) -> Iterator[None]:
        """Raise at the end if a module has kept a placeholder as an attribute or a buffer.

        Whatever ends it, such attributes and buffers are then what they were before.

        Args:
            model: The model.

        Raises:
            PlaceholderKeptError: If a module has kept one.
        """
        self._made = False
        before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
        kept: list[str] = []
        try:
            yield
        finally:
            for module, attributes, buffers in before if self._made else ():
                for now, then in ((vars(module), attributes), (module._buffers, buffers)):
                    for name in _kept(now, then):
                        kept.append(f"{type(module).__name__} keeps {name}")
                        now.pop(name)
                        now.update({name: then[name]} if name in then else {})
        if kept:
            raise PlaceholderKeptError(f"{', '.join(kept)}.")


# What every module has holds its parameters, buffers, modules and hooks.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _kept(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """Names of what holds a placeholder among the attributes of a module; nothing holds one ``then``."""
    return [
        name
        for name, value in now.items()
        if name not in _OF_EVERY_MODULE
        # What is still the same object may have been filled, unless it is a tensor or numbers (as of a kernel's size).
        and (isinstance(value, list | dict) or value is not then.get(name) or _is_nested(value))
        and isinstance(value, Tensor | list | tuple | dict)
        and holds_placeholder(value)
    ]


def _is_nested(value: Any) -> bool:
    return isinstance(value, tuple) and not all(isinstance(item, int | float | str) for item in value)


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
