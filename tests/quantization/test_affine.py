import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization.observer import MinMaxObserver as TorchMinMaxObserver

from lightning_calibtip.quantization.affine import (
    check_bits,
    choose_qparams,
    dequantize,
    fake_quantize,
    integer_range,
    quantize,
)


@given(st.integers(0, 10_000), st.integers(2, 16), st.booleans(), st.floats(1e-4, 1e4))
@settings(max_examples=60, deadline=None)
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(seed, bits, symmetric, spread):
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(seed)) * spread
    qmin, qmax = integer_range(bits, symmetric)
    for axis in (None, 0, 1, 2):
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
        scale, zero_point = choose_qparams(rows.amin(1), rows.amax(1), bits, symmetric)
        integers = quantize(x, scale, zero_point, qmin, qmax, axis)
        assert qmin <= int(integers.min()) and int(integers.max()) <= qmax
        got = fake_quantize(x, scale, zero_point, qmin, qmax, axis)
        assert torch.equal(got, dequantize(integers, scale, zero_point, axis))
        # What was quantized once stays where it is: a checkpoint of integers loses nothing.
        assert torch.equal(quantize(got, scale, zero_point, qmin, qmax, axis), integers)


@given(st.integers(0, 10_000), st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_rounding_error_inside_the_range_is_at_most_half_a_step(seed, bits):
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    scale, zero_point = choose_qparams(x.min().view(1), x.max().view(1), bits, symmetric=False)
    error = (fake_quantize(x, scale, zero_point, *integer_range(bits, False)) - x).abs()
    # Rounding the zero point moves each end of the range by up to half a step.
    assert float(error.max()) <= float(scale) * 1.001


def test_qparams_equal_those_of_torch_ao():
    x = torch.randn(1000) * 3 + 1
    for symmetric, scheme in ((False, torch.per_tensor_affine), (True, torch.per_tensor_symmetric)):
        theirs = TorchMinMaxObserver(dtype=torch.qint8 if symmetric else torch.quint8, qscheme=scheme)
        theirs(x)
        wanted_scale, wanted_zero_point = theirs.calculate_qparams()
        scale, zero_point = choose_qparams(x.min(), x.max(), 8, symmetric)
        torch.testing.assert_close(scale, wanted_scale.squeeze())
        assert int(zero_point) == int(wanted_zero_point)


def test_zero_is_exact_whatever_the_range():
    for low, high in ((0.3, 5.0), (-7.0, -1.0), (-0.1, 12.0), (0.0, 0.0), (2.0, 2.0)):
        for symmetric in (False, True):
            scale, zero_point = choose_qparams(torch.tensor([low]), torch.tensor([high]), 4, symmetric)
            assert float(fake_quantize(torch.zeros(1), scale, zero_point, *integer_range(4, symmetric))) == 0.0


def test_constants_and_zeros_survive():
    for value in (0.0, 3.0, -2.5, 1e-38):
        x = torch.full((4,), value)
        scale, zero_point = choose_qparams(x.min().view(1), x.max().view(1), 8, False)
        got = fake_quantize(x, scale, zero_point, 0, 255)
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-30)


def test_symmetric_range_without_negatives_uses_all_integers():
    scale, zero_point = choose_qparams(torch.tensor([0.0]), torch.tensor([15.0]), 4, symmetric=True, one_sided=True)
    x = torch.arange(16.0)
    assert torch.equal(fake_quantize(x, scale, zero_point, -8, 7), x)
    assert choose_qparams(torch.tensor([0.0]), torch.tensor([15.0]), 4, symmetric=True)[1] == 0


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
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_half_precision_input_comes_back_in_its_type():
    got = fake_quantize(torch.randn(9, dtype=torch.bfloat16), torch.tensor([0.1]), torch.tensor([0.0]), -8, 7)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [1, 17, 0, -4, 4.0, "8", True])
def test_bits_outside_2_to_16_are_refused_with_name_and_value(bits):
    with pytest.raises(ValueError, match=r"weight_bits must be an integer from 2 to 16, got"):
        check_bits(bits, "weight_bits")
