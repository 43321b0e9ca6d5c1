"""Which parameters of a model gradients reach for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def trainable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, gradients reach exactly these parameters, and autocast keeps no casts of them: a cast that is kept would
    be that of an earlier step, or of a pass without gradients. A model whose own autocast keeps casts needs
    ``torch.clear_autocast_cache()`` before each step, too.

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
    keeps_casts = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(keeps_casts)
        torch.clear_autocast_cache()
        for parameter, learned in zip(parameters, was, strict=True):
            parameter.requires_grad_(learned)
            parameter.grad = None
