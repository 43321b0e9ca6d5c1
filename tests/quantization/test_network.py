import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lightning_calibtip.quantization.kinds import layer_kind, register_layer
from lightning_calibtip.quantization.network import QuantizedNetwork
from lightning_calibtip.quantization.scheme import QuantizationScheme, check_pair
from tests.networks import calibrated_network, calibration_set


def test_weights_and_inputs_lie_on_the_integer_grid(tiny_resnet, images):
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images), weight_bits=3, activation_bits=4)
    inputs = {}
    for name, layer in network.layers.items():
        layer.module.register_forward_hook(lambda m, args, out, name=name: inputs.__setitem__(name, args[0]))
    with torch.no_grad():
        tiny_resnet(images)
    for name, layer in network.layers.items():
        on_weight, on_input = layer.quantizers
        scale, zero_point = on_weight.scale.view(-1, *[1] * (layer.weight.dim() - 1)), on_weight.zero_point
        integers = layer.module.weight / scale + zero_point.view(-1, *[1] * (layer.weight.dim() - 1))
        assert (integers - integers.round()).abs().max() < 1e-4
        assert integers.min() > -0.5 and integers.max() < 2 ** layer.bits[0] - 0.5
        for channel in layer.module.weight:
            assert len(channel.unique()) <= 2 ** layer.bits[0]
        integers = inputs[name] / on_input.scale + on_input.zero_point
        assert (integers - integers.round()).abs().max() < 1e-3
        assert len(inputs[name].unique()) <= 2 ** layer.bits[1]
    assert [layer.bits for layer in network.layers.values()] == [(8, 8)] + [(3, 4)] * 4 + [(8, 8)]


@pytest.mark.parametrize(
    "layer,shape",
    [
        (nn.Conv1d(3, 5, 3), (4, 3, 8)),
        (nn.Conv2d(3, 5, 3), (4, 3, 8, 8)),
        (nn.Conv3d(3, 5, 2), (4, 3, 4, 4, 4)),
        (nn.ConvTranspose1d(3, 5, 3), (4, 3, 8)),
        (nn.ConvTranspose2d(3, 5, 3), (4, 3, 6, 6)),
        (nn.ConvTranspose3d(3, 5, 2), (4, 3, 4, 4, 4)),
        (nn.Linear(3, 5), (4, 3)),
    ],
)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_layer_type_is_quantized_close_to_float_at_8_bits(layer, shape, per_channel, symmetric):
    torch.manual_seed(0)
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(shape)
    with torch.no_grad():
        wanted = model(x)
        network = calibrated_network(
            model,
            calibration_set(model, x),
            weight_bits=8,
            activation_bits=8,
            per_channel=per_channel,
            symmetric=symmetric,
        )
        got = model(x)
    assert 0 < float((got - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    assert network.layers["0"].weight_quantizer.scale.numel() == (5 if per_channel else 1)
    assert isinstance(model[0], type(layer))


def test_subclass_with_its_own_forward_and_keyword_input_is_quantized():
    class Scaled(nn.Linear):
        def forward(self, *, features):
            return F.linear(features, self.weight * 2, self.bias)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Scaled(4, 4)

        def forward(self, x):
            return self.fc(features=x)

    model, x = Net(), torch.randn(16, 4)
    calibrated_network(model, calibration_set(model, x), weight_bits=2, activation_bits=2, edge_bits=None)
    seen = []
    model.fc.register_forward_hook(lambda m, a, k, o: seen.append(k["features"]), with_kwargs=True)
    model(x)
    assert len(seen[0].unique()) <= 4 and isinstance(model.fc, Scaled)


def test_float_model_comes_back_inside_quantized_false_and_quantization_after_it(tiny_resnet, images):
    original = copy.deepcopy(tiny_resnet)
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images))
    with torch.no_grad():
        quantized = tiny_resnet(images)
        network.layers["head"].weight.mul_(3)
        network.layers["head"].bias.add_(1)
        with network.quantized(False):
            torch.testing.assert_close(tiny_resnet(images), original(images), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tiny_resnet(images), quantized)
    with pytest.raises(KeyError), network.quantized(False):
        raise KeyError
    assert network.calibrated


def test_computing_quantized_before_calibration_is_an_error(tiny_resnet):
    network = QuantizedNetwork(tiny_resnet, QuantizationScheme())
    with pytest.raises(RuntimeError, match="run Calibration first"), network.quantized(True):
        pass


def test_layer_that_never_runs_stays_float_with_a_warning_that_names_it(caplog):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.used(x))

    model = Net()
    with caplog.at_level(logging.WARNING):
        network = calibrated_network(model, calibration_set(model, torch.randn(8, 4)))
    assert "unused" in caplog.text and "no calibration batch has reached it" in caplog.text
    lines = {line.name: line for line in network.summary()}
    assert lines["unused"].kind == "float" and "no calibration batch" in lines["unused"].note
    assert lines["used"].kind == "quantized" and lines["last"].weight_bits == 8
    assert type(model.unused) is nn.Linear


def test_summary_names_every_layer_and_batch_norm(tiny_resnet, images):
    network = calibrated_network(
        tiny_resnet, calibration_set(tiny_resnet, images), overrides={"blocks.1.*": None, "blocks.0.conv2": (2, 8)}
    )
    lines = {line.name: line for line in network.summary()}
    assert {name for name, line in lines.items() if line.kind == "folded"} == {
        "norm", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2",
    }  # fmt: skip
    assert lines["blocks.1.conv1"].kind == "float" and "override" in lines["blocks.1.conv1"].note
    assert (lines["blocks.0.conv2"].weight_bits, lines["blocks.0.conv2"].activation_bits) == (2, 8)
    assert (lines["stem"].weight_bits, lines["blocks.0.conv1"].weight_bits) == (8, 4)
    assert lines["stem"].type == "Conv2d"


def test_parametrized_weights_are_baked_and_quantized():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(32, 4)
    wanted = model(x)
    network = calibrated_network(model, calibration_set(model, x), weight_bits=8, activation_bits=8)
    assert "0" in network.layers
    torch.testing.assert_close(model(x), wanted, rtol=0.05, atol=0.05)


def test_dead_channel_and_constant_activation_work():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.5, -1.0]))
        x = torch.randn(4, 1, 3, 3)
        wanted = model(x)
        calibrated_network(model, calibration_set(model, x), weight_bits=8, activation_bits=8)
        torch.testing.assert_close(model(x), wanted, rtol=0.02, atol=0.02)


def test_registered_layer_type_is_quantized():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 1))

        def forward(self, x):
            return x * self.weight[:, 0]

    register_layer(Scale, channel_axis=0)
    assert layer_kind(nn.ReLU()) is None
    model = nn.Sequential(Scale(), nn.Linear(4, 2))
    assert set(calibrated_network(model, calibration_set(model, torch.randn(8, 4))).layers) == {"0", "1"}


def test_override_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"overrides\['layr1'\] matches no quantizable layer; the layers are: 0"):
        QuantizedNetwork(nn.Sequential(nn.Linear(2, 2)), QuantizationScheme(overrides={"layr1": 8}))


def test_quantizing_twice_is_refused(tiny_resnet, images):
    calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images))
    with pytest.raises(ValueError, match="already quantized"):
        QuantizedNetwork(tiny_resnet, QuantizationScheme())


def test_model_without_quantizable_layer_is_refused():
    with pytest.raises(ValueError, match="Sequential has no quantizable layer"):
        QuantizedNetwork(nn.Sequential(nn.ReLU()), QuantizationScheme())


def test_nan_inside_the_model_names_the_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.LogSoftmax(-1), nn.Linear(2, 2))
    model[0].bias.data[0] = -torch.inf
    with pytest.raises(ValueError, match="2 input: NaN or infinity"):
        calibrated_network(model, calibration_set(model, torch.randn(4, 2)))


@pytest.mark.parametrize("value", ["48", [4], [4, 8, 2], (4, 40)])
def test_malformed_widths_are_refused(value):
    with pytest.raises(ValueError, match=r"overrides\['a'\] must be"):
        check_pair(value, "overrides['a']")


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "edge_bits"])
@pytest.mark.parametrize("bits", [1, 17])
def test_widths_outside_2_to_16_are_refused(name, bits):
    with pytest.raises(ValueError, match=f"{name} must be an integer from 2 to 16, got {bits}"):
        QuantizationScheme(**{name: bits})
