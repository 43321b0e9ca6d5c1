"""Which parameters of a model gradients reach for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def trainable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, gradients reach exactly these parameters; casts of them that autocast has kept are forgotten.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        >>> with trainable([parameter]):
        ...     parameter.requires_grad
        True
        >>> parameter.requires_grad
        False
    """
    was = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    # No gradient would go through a cast that a pass without gradients has left.
    torch.clear_autocast_cache()
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, learned in zip(parameters, was, strict=True):
            parameter.requires_grad_(learned)
            parameter.grad = None
