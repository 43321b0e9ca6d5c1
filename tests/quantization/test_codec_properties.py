"""Properties of the affine codec, for any format, scale, zero point and tensor."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_calibtip.quantization.affine import decode, encode, fake_quantize, integer_range
from tests.properties import examples

BITS, SEEDS = st.integers(2, 16), st.integers(0, 2**32 - 1)
# Scales from 2^-20 to 2^20, which are no powers of two.
EXPONENTS = st.floats(-20, 20)


def drawn(seed, bits, symmetric, exponent, rows=4):
    """A tensor that reaches beyond the range of each of its rows, with a scale and a zero point for each."""
    generator = torch.Generator().manual_seed(seed)
    qmin, qmax = integer_range(bits, symmetric)
    scale = torch.rand(rows, generator=generator).add(0.5).mul(2.0**exponent)
    point = torch.zeros(rows) if symmetric else torch.randint(qmin, qmax + 1, (rows,), generator=generator).float()
    unit = torch.rand(rows, 40, generator=generator) * 1.5 - 0.25
    x = (qmin - point[:, None] + unit * (qmax - qmin)) * scale[:, None]
    return x, scale, point, qmin, qmax


@given(SEEDS, BITS, st.booleans(), EXPONENTS)
@examples(60)
def test_a_round_trip_inside_the_range_moves_a_value_by_half_a_step_at_most(seed, bits, symmetric, exponent):
    x, scale, point, qmin, qmax = drawn(seed, bits, symmetric, exponent)
    got = fake_quantize(x, scale, point, qmin, qmax, 0)
    low, high = ((end - point[:, None]) * scale[:, None] for end in (qmin, qmax))
    steps = (got - x.clamp(low, high)).abs() / scale[:, None]
    # The quotient is off by 2^-24 of at most 2^16 steps, and so is the product.
    assert float(steps.max()) <= 0.5 + 2 * 2.0 ** (bits - 24)


@given(SEEDS, BITS, st.booleans(), EXPONENTS)
@examples(60)
def test_the_codec_is_monotone_idempotent_and_keeps_zero(seed, bits, symmetric, exponent):
    x, scale, point, qmin, qmax = drawn(seed, bits, symmetric, exponent)
    ordered = x.sort(1).values
    integers = encode(ordered, scale, point, qmin, qmax, 0)
    assert bool((integers.diff(dim=1) >= 0).all())
    assert qmin <= int(integers.min()) and int(integers.max()) <= qmax
    got = decode(integers, scale, point, qmin, qmax, 0)
    assert torch.equal(encode(got, scale, point, qmin, qmax, 0), integers)
    assert torch.equal(fake_quantize(got, scale, point, qmin, qmax, 0), got)
    zeros = torch.zeros(4, 1)
    assert torch.equal(fake_quantize(zeros, scale, point, qmin, qmax, 0), zeros)


@given(SEEDS, st.integers(2, 8), st.integers(-12, 12))
@examples(60)
def test_it_is_pytorchs_where_division_is_exact(seed, bits, exponent):
    x, _, point, qmin, qmax = drawn(seed, bits, False, exponent)
    # PyTorch multiplies by the reciprocal, which is exact for a power of two.
    scale = torch.full((4,), 2.0**exponent)
    wanted = torch.fake_quantize_per_channel_affine(x, scale, point.int(), 0, qmin, qmax)
    assert torch.equal(fake_quantize(x, scale, point, qmin, qmax, 0), wanted)


@given(SEEDS, st.integers(2, 8), st.booleans())
@examples(40)
def test_gradients_are_finite_differences_where_nothing_is_rounded(seed, bits, symmetric):
    x, scale, point, qmin, qmax = drawn(seed, bits, symmetric, 0.0)
    integers = torch.round(x / scale[:, None]) + point[:, None]
    # So far beyond that scales a thirty-second larger do not bring it back.
    margin = 1 + (qmax - qmin) / 16
    beyond = (integers < qmin - margin) | (integers > qmax + margin)
    x.requires_grad_(), scale.requires_grad_()
    fake_quantize(x, scale, point, qmin, qmax, 0)[beyond].sum().backward()
    # Beyond the range the output does not depend on x, and is an integer times the scale: a difference quotient over a
    # power of two is off by the rounding of the two sums, each of at most 2^8 steps of up to 1.5.
    assert not bool(x.grad[beyond].any())
    for row in range(4):
        change = torch.zeros(4)
        change[row] = 2.0**-6
        up, down = (
            fake_quantize(x.detach(), scale.detach() + sign * change, point, qmin, qmax, 0)[row][beyond[row]].sum()
            for sign in (1, -1)
        )
        quotient = float(up - down) / 2.0**-5
        terms = int(beyond[row].sum())
        assert abs(quotient - float(scale.grad[row])) <= terms * 2.0 ** (bits + 1 - 24 + 5) * 4 + 1e-3
