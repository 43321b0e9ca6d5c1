"""Which elements of a tensor belong to tokens that count, where sequences of a batch are padded to one length, or to
rows that do, where some nodes of a graph are not for training."""

from collections.abc import Sequence

import torch
from torch import Tensor


def token_mask(shape: Sequence[int], tokens: Tensor | None, axes: Sequence[int]) -> Tensor | None:
    """Mask over a tensor of some shape, by the mask of its tokens.

    Args:
        shape: Shape of the tensor.
        tokens: Shape (batch, positions), True where a token counts, or shape (rows,), True where a row does, such as a
            node of a graph; None if all do.
        axes: Dimensions that run over the positions of the batch that lies along dimension 0. Rows of all tokens one
            after the other, ``(batch * positions, width)``, are known by their number. A tensor without such
            dimensions has no rows that could be left out, either.

    Returns:
        Bool, with as many dimensions as the tensor and broadcastable to it; None where the shape does not fit: then
        every element counts.

    Example:
        >>> tokens = torch.tensor([[True, True, False]])
        >>> token_mask((1, 3, 2), tokens, axes=(1,)).tolist()
        [[[True], [True], [False]]]
    """
    if tokens is None:
        return None
    if tokens.dim() == 1:
        return tokens.view(-1, *[1] * (len(shape) - 1)) if axes and shape and shape[0] == len(tokens) else None
    batch, positions = tokens.shape
    if axes and len(shape) == 2 and shape[0] == batch * positions:
        return tokens.reshape(-1, 1)
    if not axes or len(shape) < 3 or shape[0] != batch or any(shape[axis] != positions for axis in axes):
        return None
    mask = torch.ones((), dtype=torch.bool, device=tokens.device)
    for axis in axes:
        mask = mask & tokens.view([batch if dim == 0 else positions if dim == axis else 1 for dim in range(len(shape))])
    return mask
