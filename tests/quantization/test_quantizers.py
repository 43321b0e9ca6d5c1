import pytest
import torch
from torch import nn

from lightning_calibtip.quantization.affine import fake_quantize
from lightning_calibtip.quantization.affine_quantizer import AffineQuantizer
from lightning_calibtip.quantization.quantizers import Quantizer, check_kind, make_quantizer, register_quantizer
from lightning_calibtip.quantization.spec import Channels, PerChannel, PerGroup, PerTensor, PerToken, TensorSpec

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def fitted(spec, x):
    quantizer = make_quantizer("x", spec, x.shape, CPU)
    rows, axis = quantizer._rows(x)
    rows = rows.reshape(1, -1) if quantizer.rows == 1 else rows.movedim(axis, 0).flatten(1)
    quantizer.set_range(rows.amin(1), rows.amax(1))
    return quantizer


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec(4),
        TensorSpec(4, granularity=PerChannel(0)),
        TensorSpec(3, True, PerGroup(7)),
        TensorSpec(2, granularity=PerGroup(100)),
    ],
)
def test_decode_of_encode_is_what_passes_when_enabled(spec):
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    quantizer = fitted(spec, x)
    assert quantizer(x) is x
    quantizer.enabled = True
    integers = quantizer.encode(x)
    assert not integers.is_floating_point() and spec.qmin <= int(integers.min()) and int(integers.max()) <= spec.qmax
    assert torch.equal(quantizer(x), quantizer.decode(integers)) and quantizer(x).shape == x.shape


@pytest.mark.parametrize("spec", [
    TensorSpec(4, granularity=PerChannel(0)), TensorSpec(4, True, PerChannel(1)), TensorSpec(8),
    TensorSpec(3, True, PerGroup(7)), TensorSpec(4, equalized=Channels(-1, 4)),
    TensorSpec(4, equalized=Channels(-3, 5)),
])  # fmt: skip
def test_large_tensors_are_encoded_and_decoded_in_parts_alike(spec, monkeypatch):
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    quantizer = fitted(spec, x)
    if spec.equalized:
        with torch.no_grad():
            quantizer.ratio.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    integers = quantizer.encode(x)
    values = quantizer.decode(integers)
    monkeypatch.setattr("lightning_calibtip.quantization.affine._PART", 24)
    assert torch.equal(quantizer.encode(x), integers) and torch.equal(quantizer.decode(integers), values)


def test_a_group_is_quantized_by_its_own_scale():
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    quantizer = fitted(TensorSpec(4, granularity=PerGroup(32)), x)
    assert quantizer.rows == 4
    for channel in range(2):
        for group, part in enumerate(x[channel].split(32)):
            row = 2 * channel + group
            wanted = fake_quantize(part, quantizer.scale[row], quantizer.zero_point[row], 0, 15)
            assert torch.equal(quantizer.fake_quantize(x)[channel].split(32)[group], wanted)


def test_gradients_reach_weight_and_scales_of_groups():
    x = torch.randn(2, 40).requires_grad_()
    quantizer = fitted(TensorSpec(4, granularity=PerGroup(32)), x.detach())
    quantizer.scale.requires_grad_()
    quantizer.fake_quantize(x).square().sum().backward()
    assert x.grad.shape == x.shape and quantizer.scale.grad.shape == (4,) and quantizer.scale.grad.abs().min() > 0


def test_each_token_has_the_range_of_its_own_values():
    x = torch.randn(2, 3, 8) * torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    quantizer = make_quantizer("x", TensorSpec(8, granularity=PerToken((-1,))), None, CPU)
    error = (quantizer.fake_quantize(x) - x).abs().amax(-1) / x.abs().amax(-1)
    # One step is at most 2 / 255 of the greatest magnitude, and no value is off by more.
    assert float(error.max()) < 2 / 255
    assert quantizer.trainables() == [] and quantizer.parameter_bytes() == 0


def test_what_is_learned_and_how_far_a_step_moves_the_range():
    quantizer = fitted(TensorSpec(4, granularity=PerChannel(0)), torch.randn(3, 8))
    scale, zero_point = quantizer.trainables()
    assert scale.parameter is quantizer.scale and scale.step == pytest.approx(float(quantizer.scale.median()) / 15)
    assert (zero_point.role, zero_point.step) == ("zero_point", 1.0)
    assert [t.role for t in fitted(TensorSpec(4, True), torch.randn(8)).trainables()] == ["scale"]
    assert [t.role for t in fitted(TensorSpec(4, nonnegative=True), torch.rand(8)).trainables()] == ["scale"]


@pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(3)])
def test_rescaling_multiplies_what_the_integers_of_a_channel_stand_for(granularity):
    x, factor = torch.randn(2, 8), torch.tensor([2.0, 0.5])
    quantizer = fitted(TensorSpec(4, granularity=granularity), x)
    integers, before = quantizer.encode(x), quantizer.fake_quantize(x)
    assert quantizer.rescale_(factor)
    assert torch.equal(quantizer.encode(x * factor[:, None]), integers)
    assert torch.equal(quantizer.decode(integers), before * factor[:, None])


def test_one_scale_for_the_whole_tensor_cannot_be_rescaled_by_channel():
    quantizer = fitted(TensorSpec(4), torch.randn(2, 8))
    scale = quantizer.scale.clone()
    assert not quantizer.rescale_(torch.ones(2)) and torch.equal(quantizer.scale, scale)


def test_zero_points_become_whole_and_scales_stay_positive():
    quantizer = fitted(TensorSpec(4), torch.randn(8))
    with torch.no_grad():
        quantizer.zero_point.fill_(17.3)
        quantizer.scale.fill_(-1.0)
    quantizer.clamp_()
    quantizer.finalize_()
    assert quantizer.zero_point.item() == 15.0 and quantizer.scale.item() > 0


def test_bytes_of_parameters_leave_out_zero_points_that_are_zero():
    assert AffineQuantizer("x", TensorSpec(4), 3).parameter_bytes() == 24
    assert AffineQuantizer("x", TensorSpec(4, True), 3).parameter_bytes() == 12
    assert AffineQuantizer("x", TensorSpec(4, True, one_sided=True), 3).parameter_bytes() == 24
    assert AffineQuantizer("x", TensorSpec(4, nonnegative=True), 3).parameter_bytes() == 12


def test_a_range_that_is_not_finite_is_refused_by_name():
    with pytest.raises(ValueError, match="fc weight: the range has a NaN or infinite end"):
        AffineQuantizer("fc weight", TensorSpec(4), 1).set_range(torch.tensor([0.0]), torch.tensor([torch.nan]))


def test_a_kind_of_ones_own_is_made_by_its_name():
    @register_quantizer("sign")
    class Sign(Quantizer):
        """One magnitude and a sign."""

        def __init__(self, name, spec, rows):
            super().__init__(name, spec, rows)
            self.magnitude = nn.Parameter(torch.ones(rows), requires_grad=False)

        def set_range(self, minimum, maximum):
            self.magnitude.data.copy_(torch.maximum(-minimum, maximum) / 2)

        def encode(self, x):
            return (x >= 0).int()

        def decode(self, q):
            return (2 * q - 1) * self.magnitude

        def fake_quantize(self, x):
            return x + (self.decode(self.encode(x)) - x).detach()

        def range(self):
            return -self.magnitude.detach(), self.magnitude.detach()

        def step_size(self):
            return float(self.magnitude)

    quantizer = make_quantizer("x", TensorSpec(2, kind="sign"), None, CPU)
    quantizer.set_range(torch.tensor([-4.0]), torch.tensor([2.0]))
    assert quantizer.fake_quantize(torch.tensor([-0.1, 3.0])).tolist() == [-2.0, 2.0]
    assert not quantizer.rescale_(torch.ones(1)) and quantizer.trainables() == [] and quantizer.parameter_bytes() == 4


@pytest.mark.parametrize("granularity", [PerGroup(32), PerGroup(7, 1)])
def test_elements_that_fill_up_a_group_get_and_give_no_gradient(granularity):
    x = torch.randn(4, 5, 9).requires_grad_()
    quantizer = fitted(TensorSpec(4, granularity=granularity), x.detach())
    quantizer.scale.requires_grad_()
    quantizer.zero_point.requires_grad_()
    quantizer.fake_quantize(x).square().sum().backward()
    got = [tensor.grad.clone() for tensor in (x, quantizer.scale, quantizer.zero_point)]
    for tensor in (x, quantizer.scale, quantizer.zero_point):
        tensor.grad = None
    rows = x.movedim(granularity.axis, 0).flatten(1)
    parts = [part for row in rows for part in row.split(granularity.size)]
    losses = [
        fake_quantize(part, quantizer.scale[i], quantizer.zero_point[i], 0, 15).square().sum()
        for i, part in enumerate(parts)
    ]
    torch.stack(losses).sum().backward()
    # The same sums of up to 32 terms in another order: float32 moves them by a few units in the last place.
    for ours, wanted in zip(got, (x.grad, quantizer.scale.grad, quantizer.zero_point.grad), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", [PerToken((-1,)), PerTensor(), PerGroup(4)])
def test_scales_that_are_powers_of_two_hold_for_every_granularity(granularity):
    @register_quantizer("test_power_of_two")
    class PowerOfTwo(AffineQuantizer):
        def choose_qparams(self, minimum, maximum):
            scale, zero_point = super().choose_qparams(minimum, maximum)
            return scale.log2().ceil().exp2(), zero_point

    x = torch.randn(3, 8)
    spec = TensorSpec(4, granularity=granularity, kind="test_power_of_two")
    quantizer = make_quantizer("x", spec, x.shape, CPU) if spec.dynamic else fitted(spec, x)
    assert type(quantizer) is PowerOfTwo
    # Values of a power-of-two grid are whole multiples of it, whichever power up to 2^10 it is.
    assert not (quantizer.fake_quantize(x) * 2**10 % 1).any()


def test_unknown_kinds_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"weight_quantizer must be one of affine, .*got 'float4'"):
        check_kind("float4", "weight_quantizer")


def test_print_tells_the_format():
    for granularity, where in (
        (PerGroup(32), "in groups of 32"),
        (PerChannel(1), "per channel of axis 1"),
        (PerToken(), "per token"),
        (PerTensor(), "per tensor"),
    ):
        quantizer = AffineQuantizer("x", TensorSpec(4, granularity=granularity), 1)
        assert f"4 bits, affine, {where}, disabled" in repr(quantizer)
    quantizer = AffineQuantizer("x", TensorSpec(4, symmetric=True), 1)
    quantizer.enabled = True
    assert "4 bits, symmetric, per tensor, enabled" in repr(quantizer)
    assert "4 bits, symmetric logarithmic, per tensor" in repr(
        AffineQuantizer("x", TensorSpec(4, True, kind="logarithmic"), 1)
    )
