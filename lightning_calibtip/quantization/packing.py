"""Integers of any bit-width packed without gaps into bytes, as they lie in a checkpoint."""

import math

import torch
from torch import Tensor


def pack_integers(values: Tensor, bits: int, qmin: int) -> Tensor:
    """Pack integers in ``[qmin, qmin + 2^bits - 1]``, lowest bit first.

    Args:
        values: Integers of any shape.
        bits: 1 to 16.
        qmin: Smallest possible value.

    Returns:
        uint8, shape ``(ceil(values.numel() * bits / 8),)``.

    Raises:
        ValueError: If a value is outside the range.

    Example:
        >>> packed = pack_integers(torch.tensor([1, -2, 0]), bits=4, qmin=-8)
        >>> packed, unpack_integers(packed, (3,), bits=4, qmin=-8)
        (tensor([105,   8], dtype=torch.uint8), tensor([ 1, -2,  0], dtype=torch.int32))
    """
    unsigned = values.reshape(-1).to(torch.int32).cpu() - qmin
    if unsigned.numel() and not 0 <= int(unsigned.min()) <= int(unsigned.max()) < 2**bits:
        raise ValueError(f"Values from {int(values.min())} to {int(values.max())} do not fit {bits} bits from {qmin}.")
    stream = ((unsigned.unsqueeze(1) >> torch.arange(bits)) & 1).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8)).sum(1).to(torch.uint8)


def unpack_integers(packed: Tensor, shape: tuple[int, ...], bits: int, qmin: int) -> Tensor:
    """Inverse of ``pack_integers``: int32 of shape ``shape``.

    Raises:
        ValueError: If ``packed`` does not have the length that ``shape`` and ``bits`` ask for.

    Example:
        See ``pack_integers``.
    """
    count = math.prod(shape)
    if len(packed) != math.ceil(count * bits / 8):
        raise ValueError(
            f"{len(packed)} bytes cannot hold exactly {count} integers of {bits} bits: damaged checkpoint?"
        )
    stream = ((packed.to(torch.int32).unsqueeze(1) >> torch.arange(8)) & 1).reshape(-1)[: count * bits].view(-1, bits)
    return ((stream << torch.arange(bits)).sum(1) + qmin).to(torch.int32).view(shape)
