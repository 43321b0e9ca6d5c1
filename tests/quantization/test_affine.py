import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.ao.quantization.observer import MinMaxObserver as TorchMinMaxObserver

from lightning_calibtip.quantization.affine import choose_qparams, decode, dot, encode, fake_quantize, integer_range
from lightning_calibtip.quantization.spec import TensorSpec, check_bits
from tests.properties import examples


@given(st.integers(0, 10_000), st.integers(2, 16), st.booleans(), st.floats(1e-4, 1e4))
@examples(60)
def test_fake_quantize_is_decode_of_encode_bit_for_bit(seed, bits, symmetric, spread):
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(seed)) * spread
    qmin, qmax = integer_range(bits, symmetric)
    for axis in (None, 0, 1, 2):
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
        scale, zero_point = choose_qparams(rows.amin(1), rows.amax(1), TensorSpec(bits, symmetric))
        integers = encode(x, scale, zero_point, qmin, qmax, axis)
        assert qmin <= int(integers.min()) and int(integers.max()) <= qmax
        got = fake_quantize(x, scale, zero_point, qmin, qmax, axis)
        assert torch.equal(got, decode(integers, scale, zero_point, qmin, qmax, axis))
        # What was quantized once stays where it is: a checkpoint of integers loses nothing. Exact on any machine: the
        # product and the quotient are off by 2^-23 each, of at most 2^16 steps, far less than half a step.
        assert torch.equal(encode(got, scale, zero_point, qmin, qmax, axis), integers)


@given(st.integers(0, 10_000), st.integers(2, 8))
@examples(40)
def test_rounding_error_inside_the_range_is_at_most_half_a_step(seed, bits):
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    scale, zero_point = choose_qparams(x.min().view(1), x.max().view(1), TensorSpec(bits))
    error = (fake_quantize(x, scale, zero_point, *integer_range(bits, False)) - x).abs()
    # Rounding the zero point moves each end of the range by up to half a step, on top of half a step of rounding; the
    # thousandth is for float32, which is off by 2^-23 of at most 2^8 steps.
    assert float(error.max()) <= float(scale) * 1.001


def test_qparams_equal_those_of_torch_ao():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for symmetric, scheme in ((False, torch.per_tensor_affine), (True, torch.per_tensor_symmetric)):
        theirs = TorchMinMaxObserver(dtype=torch.qint8 if symmetric else torch.quint8, qscheme=scheme)
        theirs(x)
        wanted_scale, wanted_zero_point = theirs.calculate_qparams()
        scale, zero_point = choose_qparams(x.min(), x.max(), TensorSpec(8, symmetric))
        # They divide 2 * reach, or reach, by other constants than ours: the last bit may differ (rtol 1.3e-6).
        torch.testing.assert_close(scale, wanted_scale.squeeze())
        assert int(zero_point) == int(wanted_zero_point)


def test_zero_is_exact_whatever_the_range():
    for low, high in ((0.3, 5.0), (-7.0, -1.0), (-0.1, 12.0), (0.0, 0.0), (2.0, 2.0)):
        for symmetric in (False, True):
            scale, zero_point = choose_qparams(torch.tensor([low]), torch.tensor([high]), TensorSpec(4, symmetric))
            assert float(fake_quantize(torch.zeros(1), scale, zero_point, *integer_range(4, symmetric))) == 0.0


def test_constants_and_zeros_survive():
    for value in (0.0, 3.0, -2.5, 1e-38):
        x = torch.full((4,), value)
        scale, zero_point = choose_qparams(x.min().view(1), x.max().view(1), TensorSpec(8))
        got = fake_quantize(x, scale, zero_point, 0, 255)
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-30)


def test_symmetric_range_without_negatives_uses_all_integers():
    scale, zero_point = choose_qparams(
        torch.tensor([0.0]), torch.tensor([15.0]), TensorSpec(4, symmetric=True, one_sided=True)
    )
    x = torch.arange(16.0)
    assert torch.equal(fake_quantize(x, scale, zero_point, -8, 7), x)
    assert choose_qparams(torch.tensor([0.0]), torch.tensor([15.0]), TensorSpec(4, symmetric=True))[1] == 0


class _Round(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_gradients_of_input_scale_and_zero_point_equal_autograd_of_the_formula():
    torch.manual_seed(0)
    for axis, shape in ((None, (1,)), (1, (4,))):
        x = (torch.randn(6, 4, 5) * 2).requires_grad_()
        scale = (torch.rand(shape) * 0.2 + 0.2).requires_grad_()
        zero_point = torch.full(shape, 5.0).requires_grad_()
        weights = torch.randn(6, 4, 5)

        def formula(x, scale, zero_point, axis=axis):
            """LSQ+ written out, with straight-through rounding."""
            view = [1, -1, 1] if axis == 1 else [1]
            s, z = scale.view(view), zero_point.view(view)
            z = _Round.apply(z)
            q = _Round.apply(x / s) + z
            # torch.clamp passes no gradient at its very ends, where x still is inside.
            return (torch.where((q >= 0) & (q <= 15), q, q.detach().clamp(0, 15)) - z) * s

        (fake_quantize(x, scale, zero_point, 0, 15, axis) * weights).sum().backward()
        got = [p.grad.clone() for p in (x, scale, zero_point)]
        for p in (x, scale, zero_point):
            p.grad = None
        (formula(x, scale, zero_point) * weights).sum().backward()
        for ours, theirs in zip(got, (x.grad, scale.grad, zero_point.grad), strict=True):
            # Float32 sums of up to 120 terms of about 10 that cancel: their order, which a machine chooses, moves them
            # by 120 * 10 * 2^-24 = 7e-5.
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("zero_point", [0.0, 4.0, 15.0])
def test_gradients_inside_and_beyond_the_range_are_those_of_lsq_by_hand(zero_point):
    # One element inside, one below, one above; quarters are exact in float32, so nothing is rounded here.
    x = torch.tensor([(3 - zero_point) * 0.5 + 0.125, -20.0, 20.0]).requires_grad_()
    scale, point = torch.tensor([0.5]).requires_grad_(), torch.tensor([zero_point]).requires_grad_()
    fake_quantize(x, scale, point, 0, 15).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0]
    # The rounding error in steps inside (-0.25), the saturated integers less the zero point outside.
    assert scale.grad.item() == -0.25 + (0 - zero_point) + (15 - zero_point)
    assert point.grad.item() == -0.5 * 2


def test_a_range_without_gradients_gets_none_and_the_input_is_left_alone():
    x = torch.linspace(-1, 1, 9)
    before = x.clone()
    fake_quantize(x, torch.tensor([0.1]), torch.tensor([3.0]), 0, 15)
    assert torch.equal(x, before)
    x.requires_grad_()
    scale = torch.tensor([0.1])
    fake_quantize(x, scale, torch.tensor([3.0]), 0, 15).sum().backward()
    assert scale.grad is None and x.grad is not None and torch.equal(x.detach(), before)


def test_scales_of_any_shape_that_broadcasts_are_taken_as_they_are():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, point = choose_qparams(low, high, TensorSpec(4))
    got = fake_quantize(x, scale, point, 0, 15)
    for batch in range(2):
        for token in range(3):
            wanted = fake_quantize(x[batch, token], scale[batch, token], point[batch, token], 0, 15)
            assert torch.equal(got[batch, token], wanted)


def test_half_precision_input_comes_back_in_its_type():
    got = fake_quantize(torch.linspace(-1, 1, 9).bfloat16(), torch.tensor([0.1]), torch.tensor([0.0]), -8, 7)
    assert got.dtype == torch.bfloat16


def quantize_linear(x, scale, zero_point, qmin, qmax):
    """QuantizeLinear as the ONNX standard states it, in numpy: division in float32, halves to even, saturation.

    IEEE 754 fixes the result of each of these operations, so equality is exact on every machine.
    """
    rounded = np.rint(x.astype(np.float32) / np.float32(scale))
    return np.clip(rounded + np.float32(zero_point), qmin, qmax)


@given(
    hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(2**-20, 2**10, width=32),
    st.integers(0, 255),
)
@examples(200)
def test_encode_equals_quantize_linear_of_onnx_exactly(x, scale, zero_point):
    got = encode(torch.from_numpy(x), torch.tensor([scale]), torch.tensor([float(zero_point)]), 0, 255)
    assert np.array_equal(got.numpy(), quantize_linear(x, scale, zero_point, 0, 255))


def test_halves_go_to_the_even_neighbour():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert encode(x, torch.ones(1), torch.zeros(1), -8, 7).tolist() == [-2, 0, 0, 2, 2]


def test_division_decides_where_the_product_with_a_reciprocal_would_round_otherwise():
    scale = torch.tensor([0.1])
    x = torch.arange(-200, 200) * scale + scale / 2
    differing = (torch.round(x * (1 / scale)) != torch.round(x / scale)).sum()
    assert differing > 0
    assert torch.equal(encode(x, scale, torch.zeros(1), -300, 300), torch.round(x / scale))


def test_zero_points_beyond_the_integers_are_clamped_everywhere():
    x, scale = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([0.5])
    for zero_point in (-3.4, 20.0):
        wanted = torch.tensor([min(max(round(zero_point), 0), 15)]).float()
        point = torch.tensor([zero_point])
        assert torch.equal(encode(x, scale, point, 0, 15), encode(x, scale, wanted, 0, 15))
        assert torch.equal(fake_quantize(x, scale, point, 0, 15), fake_quantize(x, scale, wanted, 0, 15))
        assert torch.equal(decode(x, scale, point, 0, 15), decode(x, scale, wanted, 0, 15))


def test_decode_passes_gradients_to_integers_and_scale():
    q = torch.tensor([0.0, 3.0, 9.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    decode(q, scale, torch.tensor([2.0]), 0, 15).sum().backward()
    assert q.grad.tolist() == [0.5, 0.5, 0.5] and scale.grad.item() == 6.0


def test_floor_may_take_the_place_of_rounding():
    got = encode(
        torch.tensor([-0.6, 1.9]), torch.tensor([1.0]), torch.zeros(1), -torch.inf, torch.inf, None, torch.floor
    )
    assert got.tolist() == [-1, 1]


def test_a_nonnegative_tensor_has_the_zero_point_zero_whatever_was_observed():
    for low in (-0.25, 0.0, 0.5):
        scale, point = choose_qparams(torch.tensor([low]), torch.tensor([15.0]), TensorSpec(4, nonnegative=True))
        assert point.item() == 0.0 and scale.item() == 1.0


def test_inner_products_do_not_depend_on_the_memory_format():
    a, b = torch.arange(48.0).view(1, 3, 4, 4), torch.arange(48.0).view(1, 3, 4, 4) - 20
    wanted = float((a * b).sum())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        # Whole numbers below 2^24: exact in any order.
        assert float(dot(a.to(memory_format=memory_format), b.to(memory_format=memory_format))) == wanted


@pytest.mark.parametrize("bits", [1, 17, 0, -4, 4.0, "8", True])
def test_bits_outside_2_to_16_are_refused_with_name_and_value(bits):
    with pytest.raises(ValueError, match=r"weight_bits must be an integer from 2 to 16, got"):
        check_bits(bits, "weight_bits")
