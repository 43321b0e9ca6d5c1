"""Integers of any bit-width packed without gaps into bytes, as they lie in a checkpoint."""

import math

import torch
from torch import Tensor

# Integers that are worked on at once, a multiple of 8: then every part ends with a whole byte.
_PART = 1 << 16


def narrowest(qmin: int, qmax: int) -> torch.dtype:
    """Narrowest integer type that holds a range.

    Args:
        qmin: Smallest value.
        qmax: Greatest value.

    Example:
        >>> narrowest(-8, 7), narrowest(0, 255), narrowest(0, 65535)
        (torch.int8, torch.uint8, torch.int32)
    """
    kinds = (torch.int8, torch.uint8, torch.int16)
    return next((d for d in kinds if torch.iinfo(d).min <= qmin and qmax <= torch.iinfo(d).max), torch.int32)


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
        (tensor([105,   8], dtype=torch.uint8), tensor([ 1, -2,  0], dtype=torch.int8))
    """
    flat = values.reshape(-1).cpu()
    if flat.numel() and not qmin <= int(flat.min()) <= int(flat.max()) < qmin + 2**bits:
        raise ValueError(f"Values from {int(flat.min())} to {int(flat.max())} do not fit {bits} bits from {qmin}.")
    packed = torch.empty(math.ceil(flat.numel() * bits / 8), dtype=torch.uint8)
    for number, part in enumerate(flat.split(_PART)):
        unsigned = part.to(torch.int32) - qmin
        stream = ((unsigned.unsqueeze(1) >> torch.arange(bits)) & 1).reshape(-1)
        stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
        start = number * _PART * bits // 8
        packed[start : start + len(stream)] = (stream << torch.arange(8)).sum(1).to(torch.uint8)
    return packed


def unpack_integers(packed: Tensor, shape: tuple[int, ...], bits: int, qmin: int) -> Tensor:
    """Inverse of ``pack_integers``, of shape ``shape``, in the narrowest type that holds all such integers.

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
    values = torch.empty(count, dtype=narrowest(qmin, qmin + 2**bits - 1))
    bytes_of_part = _PART * bits // 8
    for start in range(0, count, _PART):
        first, stop = start * bits // 8, min(start + _PART, count)
        part = packed[first : first + bytes_of_part].to(torch.int32)
        stream = ((part.unsqueeze(1) >> torch.arange(8)) & 1).reshape(-1)[: (stop - start) * bits].view(-1, bits)
        values[start:stop] = ((stream << torch.arange(bits)).sum(1) + qmin).to(values.dtype)
    return values.view(shape)
