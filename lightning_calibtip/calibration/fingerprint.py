"""Digests of tensors, by which a run knows whether what it finds on disk is its own."""

import hashlib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import Tensor, uint8
from torch.utils._pytree import tree_leaves

from ..quantization.layers import LayerState
from .calibration_set import CalibrationSet, plain


def digest(values: Iterable[Any]) -> str:
    """SHA-256 of tensors (type, shape and content) and of whatever else by its ``repr``."""
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
    """Digest of everything in these states."""
    return digest(
        leaf for state in states for field in fields(LayerState) for leaf in tree_leaves(getattr(state, field.name))
    )


def digest_data(calibration: CalibrationSet) -> str:
    """Digest of all batches."""
    return digest(tree_leaves([plain(batch) for batch in calibration.batches]))
