from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_calibtip.quantization import packing
from lightning_calibtip.quantization.packing import pack_integers, unpack_integers
from lightning_calibtip.quantization.quantizers import make_quantizer
from lightning_calibtip.quantization.spec import PerChannel, PerGroup, TensorSpec
from tests.properties import examples


@given(st.integers(1, 16), st.booleans(), st.integers(0, 40), st.integers(0, 1000), st.sampled_from([8, 32, 1 << 16]))
@examples(100)
def test_unpacking_gives_back_what_was_packed_in_the_fewest_bytes(bits, signed, count, seed, part):
    qmin = -(2 ** (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(qmin, qmin + 2**bits, (count, 3), generator=generator, dtype=torch.int32)
    with mock.patch.object(packing, "_PART", part):
        packed = pack_integers(values, bits, qmin)
        unpacked = unpack_integers(packed, (count, 3), bits, qmin)
    assert packed.dtype == torch.uint8 and len(packed) == -(-3 * count * bits // 8)
    assert torch.equal(unpacked.to(torch.int32), values)


class LargestTensor(TorchDispatchMode):
    """Notes the greatest number of bytes of any tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))])
        return output


@pytest.mark.parametrize("spec", [TensorSpec(4, True, PerChannel(0)), TensorSpec(8, granularity=PerGroup(32))])
def test_little_is_held_besides_the_result(spec):
    weight = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0))
    quantizer = make_quantizer("weight", spec, weight.shape, weight.device)
    with torch.no_grad():
        quantizer.scale.fill_(0.3)
    with LargestTensor() as encoding:
        packed = pack_integers(quantizer.encode(weight), spec.bits, spec.qmin)
    # In groups, the weight itself is looked at through a view.
    assert encoding.bytes <= (weight.nbytes if isinstance(spec.granularity, PerGroup) else 2 * weight.numel())
    with LargestTensor() as unpacking:
        integers = unpack_integers(packed, weight.shape, spec.bits, spec.qmin)
    assert unpacking.bytes <= 2 * weight.numel()
    with LargestTensor() as decoding:
        values = quantizer.decode(integers)
    assert decoding.bytes == values.nbytes


def test_values_outside_the_range_are_refused():
    with pytest.raises(ValueError, match="Values from 0 to 16 do not fit 4 bits from 0"):
        pack_integers(torch.tensor([0, 16]), 4, 0)


def test_damaged_data_are_refused():
    packed = pack_integers(torch.arange(8), 4, 0)
    with pytest.raises(ValueError, match="3 bytes cannot hold exactly 8 integers of 4 bits"):
        unpack_integers(packed[:-1], (8,), 4, 0)
