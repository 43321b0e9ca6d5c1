import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_calibtip.quantization.packing import pack_integers, unpack_integers


@given(st.integers(2, 16), st.booleans(), st.integers(0, 40), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_unpacking_gives_back_what_was_packed_in_the_fewest_bytes(bits, signed, count, seed):
    qmin = -(2 ** (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(qmin, qmin + 2**bits, (count, 3), generator=generator, dtype=torch.int32)
    packed = pack_integers(values, bits, qmin)
    assert packed.dtype == torch.uint8 and len(packed) == -(-3 * count * bits // 8)
    assert torch.equal(unpack_integers(packed, (count, 3), bits, qmin), values)


def test_values_outside_the_range_are_refused():
    with pytest.raises(ValueError, match="Values from 0 to 16 do not fit 4 bits from 0"):
        pack_integers(torch.tensor([0, 16]), 4, 0)


def test_damaged_data_are_refused():
    packed = pack_integers(torch.arange(8), 4, 0)
    with pytest.raises(ValueError, match="3 bytes cannot hold exactly 8 integers of 4 bits"):
        unpack_integers(packed[:-1], (8,), 4, 0)
