"""Digests of tensors, by which a run recognises whether what it finds on disk is its own."""

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, uint8
from torch.utils._pytree import tree_leaves

from ..network.states import LayerState
from .calibration_set import CalibrationSet, plain


def digest(values: Iterable[Any]) -> str:
    """SHA-256 of tensors (type, shape and content) and of any other values by their ``repr``.

    Args:
        values: Tensors and other values, in a fixed order.

    Example:
        >>> import torch
        >>> digest([torch.ones(2), "W4A8"]) == digest([torch.ones(2), "W4A4"])
        False
    """
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().view(-1)
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(flat.view(uint8).numpy().data if flat.numel() else b"")
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def digest_states(states: Iterable[LayerState]) -> str:
    """Digest of everything in these states of layers. See ``digest``.

    Args:
        states: States, in a fixed order.
    """
    return digest(leaf for state in states for leaf in tree_leaves(state.to_dict()))


def digest_data(calibration: CalibrationSet) -> str:
    """Digest of all calibration batches. See ``digest``.

    Args:
        calibration: Calibration set.
    """
    return digest(tree_leaves([plain(batch) for batch in calibration.batches]))
