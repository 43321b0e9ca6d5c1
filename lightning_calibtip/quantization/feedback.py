"""Second-order rounding of a weight with error feedback (GPTQ: Frantar et al. 2023; OBQ: Frantar and Alistarh 2022)."""

import torch
from torch import Tensor

from .affine import decode, encode

# Columns that are rounded before their errors are passed on to all later ones at once (GPTQ, section 3.3, step 2).
_BLOCK = 128


def round_with_feedback(
    weight: Tensor, gram: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, damping: float = 0.01
) -> Tensor:
    """Round one input dimension after the other, and make up for the error of each in those that are not rounded yet.

    The dimensions come in the order of falling mean square of the input. Each error is passed on by the inverse of the
    damped Gram matrix, in Cholesky form and in float64 (Frantar et al. 2023, eqs. 2 to 4 and algorithm 1), so that the
    squared error of the output grows as little as it can.

    Args:
        weight: Rows of weights, shape (groups, rows, n), where groups have inputs of their own.
        gram: Sums of the inputs' products, shape (groups, n, n).
        scale: Scale of each weight, of the shape of ``weight``.
        zero_point: Zero point of each weight.
        qmin: Smallest integer.
        qmax: Greatest integer.
        damping: Share of the mean of the diagonal that is added to it, above 0.

    Returns:
        The weights as they were just before each was rounded, float32: rounded to nearest, they are the result.

    Raises:
        ValueError: If the Gram matrix has a NaN or infinity.

    Example:
        >>> weight, gram = torch.tensor([[[0.4, 0.4]]]), torch.tensor([[[1.0, 0.99], [0.99, 1.0]]])
        >>> one = torch.ones_like(weight)
        >>> round_with_feedback(weight, gram, one, 0 * one, -8, 7).round()
        tensor([[[0., 1.]]])
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("The inputs of the layer have a NaN or infinity.")
    wide = gram.double()
    diagonal = wide.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    # Inputs that are always zero: their weights cost nothing.
    mean = diagonal.mean(-1, keepdim=True)
    damped = wide + torch.diag_embed(damping * torch.where(mean > 0, mean, torch.ones_like(mean)).expand_as(diagonal))
    damped = _ordered(_ordered(damped, order).mT, order).mT
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest, scale, zero_point = (_ordered(x, order) for x in (weight.double(), scale, zero_point))
    for start in range(0, rest.shape[-1], _BLOCK):
        stop = min(start + _BLOCK, rest.shape[-1])
        block, errors = rest[..., start:stop], torch.empty_like(rest[..., start:stop])
        for column in range(stop - start):
            there = start + column
            value, parameters = block[..., column], (scale[..., there], zero_point[..., there], qmin, qmax)
            rounded = decode(encode(value.float(), *parameters), *parameters)
            error = (value - rounded) / upper[:, there, there].unsqueeze(-1)
            block[..., column + 1 :] -= error.unsqueeze(-1) * upper[:, there, there + 1 : stop].unsqueeze(-2)
            errors[..., column] = error
        rest[..., stop:] -= errors @ upper[:, start:stop, stop:]
    return _ordered(rest, order.argsort(-1)).float()


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """The last dimension of (groups, rows, n) in the order of each group, (groups, n)."""
    return x.gather(-1, order.unsqueeze(-2).expand_as(x))
