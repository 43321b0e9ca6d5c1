import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.calibration.recording import UnitCall
from lightning_calibtip.network.layer_types import register_layer
from lightning_calibtip.quantization.affine import fake_quantize
from lightning_calibtip.quantization.affine_quantizer import AffineQuantizer
from lightning_calibtip.quantization.feedback import round_with_feedback
from lightning_calibtip.quantization.quantizers import register_quantizer
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.feedback import _gram, _Products
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.reconstruction.unit_data import MiniBatch
from lightning_calibtip.reconstruction.units import find_units
from tests.networks import calibrated_network, calibration_set


def correlated(*shape):
    """Inputs that can make up for each other's errors: three sources seen by all of them."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, shape[1], generator=generator)
    sources = torch.randn(shape[0], *shape[2:], 3, generator=generator)
    noise = 0.1 * torch.randn(shape, generator=generator)
    return (sources @ mix).movedim(-1, 1) + noise


def test_the_output_loses_less_than_with_rounding_to_nearest():
    x = correlated(512, 24).double()
    weight = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(1))
    scale, point = torch.full_like(weight, 0.4), torch.zeros_like(weight)
    moved = round_with_feedback(weight, (x.T @ x)[None], scale, point, -8, 7)
    errors = {}
    for name, start in (("nearest", weight), ("feedback", moved)):
        rounded = fake_quantize(start, scale, point, -8, 7)
        errors[name] = float((x @ (rounded - weight)[0].T.double()).square().mean())
    assert errors["feedback"] < 0.3 * errors["nearest"]
    # Each weight is where it was just before it was rounded: within half a step, unless it saturates.
    inside = (moved / scale).abs() < 7
    assert ((moved - fake_quantize(moved, scale, point, -8, 7)).abs()[inside] <= 0.2001).all()


def test_independent_inputs_are_rounded_to_nearest():
    weight = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    scale, point = torch.full_like(weight, 0.4), torch.zeros_like(weight)
    moved = round_with_feedback(weight, torch.eye(6)[None], scale, point, -8, 7)
    assert torch.allclose(moved, weight, atol=1e-6)


def test_inputs_that_are_always_zero_and_bad_ones():
    weight, gram = torch.randn(1, 4, 6), torch.zeros(1, 6, 6)
    scale, point = torch.full_like(weight, 0.4), torch.zeros_like(weight)
    assert torch.allclose(round_with_feedback(weight, gram, scale, point, -8, 7), weight)
    gram[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        round_with_feedback(weight, gram, scale, point, -8, 7)


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as ports of TensorFlow's do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Switched(nn.Module):
    """A layer whose weight has the output channels last, and whose product is an addmm."""

    def __init__(self, n, m):
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(n, m) / n**0.5), nn.Parameter(torch.zeros(m))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.kernel)


register_layer(Switched, 1, weight="kernel")

ROWS, IMAGES = correlated(256, 24), correlated(96, 16, 6, 6)


class Named(nn.Linear):
    """A product whose arguments are given by name."""

    def forward(self, x):
        return F.linear(input=x, weight=self.weight, bias=self.bias)


class Singly(nn.Conv2d):
    """A convolution of one image after the other, without the dimension of the batch."""

    def forward(self, x):
        return torch.stack([super(Singly, self).forward(image) for image in x])


def test_what_a_convolution_reads_is_counted_evenly():
    torch.manual_seed(0)
    x, layer = torch.randn(64, 3, 32, 32), nn.Conv2d(3, 4, 3, padding=1)
    calibration = calibration_set(nn.Sequential(layer).eval(), x)
    network = calibrated_network(nn.Sequential(layer).eval(), calibration, edge_bits=None)
    (unit,) = find_units(network, "layer")
    batch = MiniBatch(UnitCall((x,), {}), None, None, None)
    with torch.no_grad(), network.quantized(False):
        gram = _gram(unit, network.layers["0"], [batch])[0]
    read = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27).double()
    # 4,096 of 65,536 positions: the standard error of a mean square is about 2.2 per cent.
    assert (gram.diagonal() / read.square().sum(0) - 1).abs().max() < 0.12


def test_a_hook_that_raises_leaves_the_stack_of_modes_alone():
    model = nn.Sequential(nn.Linear(24, 16)).eval()
    network = calibrated_network(model, calibration_set(model, ROWS), edge_bits=None)
    products = _Products(network.layers["0"])

    def fail(*_):
        raise KeyError("mine")

    hook = model[0].register_forward_pre_hook(fail, prepend=True)
    with torch.device("cpu"), products.watching(), pytest.raises(KeyError, match="mine"):
        model(ROWS)
    hook.remove()
    with products.watching(), torch.no_grad():
        model(ROWS)
    assert products.gram is not None


@pytest.mark.parametrize("layer, data, scheme", [
    (lambda: Named(24, 16), ROWS, {}),
    (lambda: Singly(16, 12, 3), IMAGES, {}),
    (lambda: nn.Conv2d(16, 12, 2, padding="same"), IMAGES, {}),
    (lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Conv3d(4, 6, 2)), IMAGES, {}),
    (lambda: nn.Linear(24, 16), ROWS, {}),
    (lambda: nn.Linear(24, 16), ROWS, {"group_size": 8}),
    (lambda: nn.Linear(24, 16), ROWS, {"per_channel": False}),
    (lambda: Switched(24, 16), ROWS, {}),
    (lambda: nn.Conv2d(16, 12, 3, padding=1, stride=2), IMAGES, {}),
    (lambda: nn.Conv2d(16, 12, 3, padding="same", dilation=2), IMAGES, {}),
    (lambda: nn.Conv2d(16, 12, 3, groups=4), IMAGES, {"symmetric": True}),
    (lambda: Padded(16, 12, 2), IMAGES, {}),
    (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(16, 12, 3)), IMAGES, {}),
])  # fmt: skip
def test_a_layer_s_output_comes_closer_before_any_step(layer, data, scheme):
    errors = {}
    for rounding in ("straight_through", "feedback"):
        torch.manual_seed(0)
        model = nn.Sequential(layer()).eval()
        calibration = calibration_set(model, data)
        options = {"weight_bits": 3, "activation_bits": None, "edge_bits": None, **scheme}
        network = calibrated_network(model, calibration, **options)
        rates = {"weight_rate": 0.0, "bias_rate": 0.0, "weight_range_rate": 0.0, "zero_point_rate": 0.0}
        # A step that moves nothing still measures.
        still = AdaQuantOptions(rounding=rounding, iterations=1, **{**rates, "bias_rate": 1e-12})
        (result,) = adaquant(network, calibration, still)
        errors[rounding] = result.error_after
    assert errors["feedback"] < 0.85 * errors["straight_through"]


@pytest.mark.parametrize("rounding", ["straight_through", "learned"])
def test_it_is_a_better_start(rounding):
    errors = {}
    for start in ("nearest", "feedback"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        calibration = calibration_set(model, ROWS)
        network = calibrated_network(model, calibration, weight_bits=2, activation_bits=8, edge_bits=None)
        results = adaquant(network, calibration, AdaQuantOptions(rounding=rounding, start=start, iterations=5))
        errors[start] = sum(result.error_after for result in results)
    assert errors["feedback"] < errors["nearest"]


def test_weights_and_their_scales_stay_where_feedback_has_put_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    calibration = calibration_set(model, ROWS)
    network = calibrated_network(model, calibration, weight_bits=3, activation_bits=8, edge_bits=None)
    layer = network.layers["0"]
    scale, bias = layer.weight_quantizer.scale.clone(), layer.bias.clone()
    adaquant(network, calibration, AdaQuantOptions(rounding="feedback", iterations=20))
    assert torch.equal(layer.weight_quantizer.scale, scale) and not torch.equal(layer.bias, bias)


def test_transposed_convolutions_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(16, 8, 3), nn.Conv2d(8, 4, 1)).eval()
    calibration = calibration_set(model, IMAGES)
    network = calibrated_network(model, calibration, weight_bits=3, activation_bits=8, edge_bits=None)
    before = network.layers["0"].weight.clone()
    adaquant(network, calibration, AdaQuantOptions(rounding="feedback", granularity="layer", iterations=3))
    assert torch.equal(network.layers["0"].weight, before)


@register_quantizer("coarse")
class Coarse(AffineQuantizer):
    def choose_qparams(self, minimum, maximum):
        scale, zero_point = super().choose_qparams(minimum, maximum)
        return 2 * scale, zero_point


def test_bad_options_are_errors():
    with pytest.raises(ValueError, match="start must be one of nearest, feedback, got 'gptq'"):
        AdaQuantOptions(start="gptq")
    model = nn.Sequential(nn.Linear(24, 16)).eval()
    calibration = calibration_set(model, ROWS)
    network = calibrated_network(model, calibration, weight_quantizer="coarse", edge_bits=None)
    for options in ({"start": "feedback"}, {"rounding": "feedback"}):
        with pytest.raises(ValueError, match=r"^0: rounding with feedback needs an affine quantizer of the weight"):
            adaquant(network, calibration, AdaQuantOptions(**options))


class Twice(nn.Module):
    """A block whose first layer runs as often as asked, before a second one."""

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x):
        try:
            for _ in range(self.times):
                x = self.first(x).relu()
        except Exception:
            raise AssertionError("the end of a pass is no error of the model's") from None
        return self.second(x)


@pytest.mark.parametrize("times", [1, 2])
def test_a_pass_ends_behind_a_layer_that_runs_once(times):
    torch.manual_seed(0)
    model = nn.Sequential(Twice(times)).eval()
    network = calibrated_network(model, calibration_set(model, ROWS), edge_bits=None)
    (unit,) = find_units(network, "block", ["0"])
    runs = []
    model[0].second.register_forward_hook(lambda *_: runs.append(1))
    batches = [MiniBatch(UnitCall((part,), {}), None, None, None) for part in ROWS.split(len(ROWS) // 4)]
    read = []
    hook = model[0].first.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        gram = _gram(unit, network.layers["0.first"], batches)[0]
    assert len(runs) == (1 if times == 1 else 4) and len(read) == 4 * times
    hook.remove()
    quantizer = network.layers["0.first"].input_quantizers[0]
    sums = sum(quantizer(x).double().T @ quantizer(x).double() for x in read)
    torch.testing.assert_close(gram, sums.detach())


def test_an_error_of_the_model_is_no_end_of_a_pass():
    torch.manual_seed(0)
    model = nn.Sequential(Twice(1)).eval()
    network = calibrated_network(model, calibration_set(model, ROWS), edge_bits=None)
    (unit,) = find_units(network, "block", ["0"])
    parts = [*ROWS.split(len(ROWS) // 4)[:2], torch.ones(3, 5)]
    batches = [MiniBatch(UnitCall((part,), {}), None, None, None) for part in parts]
    with torch.no_grad(), pytest.raises(AssertionError, match="no error of the model's"):
        _gram(unit, network.layers["0.first"], batches)
