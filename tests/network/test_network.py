import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lightning_calibtip.network.layer_types import Operand, layer_type_of, register_layer
from lightning_calibtip.network.network import QuantizedNetwork
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.network.states import LayerState
from lightning_calibtip.quantization.spec import BitWidths, LayerConfig
from tests.networks import calibrated_network, calibration_set


def test_weights_and_inputs_lie_on_the_integer_grid(tiny_resnet, images):
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images), weight_bits=3, activation_bits=4)
    inputs = {}
    for name, layer in network.layers.items():
        layer.module.register_forward_hook(lambda m, args, out, name=name: inputs.__setitem__(name, args[0]))
    with torch.no_grad():
        tiny_resnet(images)
    for name, layer in network.layers.items():
        weight_quantizer, input_quantizer = layer.quantizers
        bits = layer.config.bit_widths
        scale = weight_quantizer.scale.view(-1, *[1] * (layer.weight.dim() - 1))
        zero_point = weight_quantizer.zero_point
        integers = layer.module.weight / scale + zero_point.view(-1, *[1] * (layer.weight.dim() - 1))
        assert (integers - integers.round()).abs().max() < 1e-4
        assert integers.min() > -0.5 and integers.max() < 2**bits.weight - 0.5
        for channel in layer.module.weight:
            assert len(channel.unique()) <= 2**bits.weight
        integers = inputs[name] / input_quantizer.scale + input_quantizer.zero_point
        assert (integers - integers.round()).abs().max() < 1e-3
        assert len(inputs[name].unique()) <= 2**bits.activation
    wanted = [BitWidths(8, 8)] + [BitWidths(3, 4)] * 4 + [BitWidths(8, 8)]
    assert [layer.config.bit_widths for layer in network.layers.values()] == wanted


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
    assert layer_type_of(nn.ReLU()) is None
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


def test_weight_only_quantization_leaves_activations_in_float(tiny_resnet, images):
    network = calibrated_network(
        tiny_resnet, calibration_set(tiny_resnet, images), weight_bits=3, activation_bits=None, edge_bits=8
    )
    seen = {}
    for name, layer in network.layers.items():
        assert layer.input_quantizers == (None,) and layer.quantizers == (layer.weight_quantizer,)
        layer.module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        tiny_resnet(images)
    assert all(len(x.unique()) > 256 for name, x in seen.items() if name != "head")
    assert [line.activation_bits for line in network.summary() if line.kind == "quantized"] == [None] * 6
    assert network.layers["head"].config.bit_widths == BitWidths(8, None)


def test_activation_only_quantization_leaves_weights_in_float(tiny_resnet, images):
    original = copy.deepcopy(tiny_resnet)
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images), weight_bits=None, activation_bits=8)
    assert torch.equal(tiny_resnet.head.weight, original.head.weight)
    assert network.layers["head"].weight_quantizer is None
    with torch.no_grad():
        assert not torch.equal(tiny_resnet(images), original(images))


def test_a_layer_calibrated_as_weight_only_can_go_to_quantized_inputs_and_back(tiny_resnet, images):
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images), activation_bits=None)
    layer = network.layers["blocks.0.conv1"]
    network.switch("blocks.0.conv1", BitWidths(4, 8))
    assert layer.input_quantizers[0].enabled and layer.input_quantizers[0].scale != 1
    network.switch("blocks.0.conv1", BitWidths(None, 8))
    assert torch.equal(layer.module.weight, layer.float_weight)
    network.switch("blocks.0.conv1", BitWidths(4, None))
    assert layer.input_quantizers == (None,) and len(layer.module.weight[0].unique()) <= 16


@pytest.mark.parametrize(
    "layer,shape,scales",
    [
        (nn.Linear(70, 3), (5, 70), 3 * 3),
        (nn.Conv2d(8, 3, 3), (2, 8, 5, 5), 3 * 3),
        (nn.ConvTranspose2d(8, 3, 3), (2, 8, 5, 5), 3 * 3),
        (nn.Conv1d(4, 3, 1), (2, 4, 5), 3 * 1),
    ],
)
def test_weights_in_groups_have_a_scale_each(layer, shape, scales):
    torch.manual_seed(0)
    model, x = nn.Sequential(layer), torch.randn(shape)
    wanted = model(x)
    network = calibrated_network(model, calibration_set(model, x), weight_bits=4, activation_bits=None, group_size=32,
                                 edge_bits=None)  # fmt: skip
    quantizer = network.layers["0"].weight_quantizer
    assert quantizer.scale.numel() == scales
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    for channel in layer.weight.movedim(axis, 0).flatten(1):
        for group in channel.split(32):
            assert len(group.unique()) <= 16
    assert 0 < float((model(x) - wanted).norm() / wanted.norm()) < 0.15
    assert "groups of 32" in network.summary()[0].note


def test_embedding_is_quantized_in_groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 40), nn.Linear(40, 3))
    tokens = torch.randint(0, 10, (8, 4))
    network = calibrated_network(model, calibration_set(model, tokens), group_size=32, activation_bits=None)
    assert network.layers["0"].weight_quantizer.scale.numel() == 20


def test_layer_with_another_weight_name_and_three_inputs_is_quantized():
    class Blend(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 4))

        def forward(self, x, y, index, *, z):
            return F.linear(x + y[index] + z, self.kernel)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.blend, self.last = nn.Linear(4, 4), Blend(), nn.Linear(3, 2)

        def forward(self, x):
            index = torch.zeros(len(x), dtype=torch.long)
            return self.last(self.blend(self.fc(x), x, index, z=x * 2))

    register_layer(Blend, 0, [Operand(), Operand(), Operand()], weight="kernel")
    model, x = Net(), torch.randn(32, 4)
    wanted = model(x)
    network = calibrated_network(model, calibration_set(model, x), weight_bits=8, activation_bits=8)
    layer = network.layers["blend"]
    assert len(layer.quantizers) == 4 and all(quantizer.scale.max() < 1 for quantizer in layer.quantizers)
    assert len(layer.module.kernel[0].unique()) <= 4
    torch.testing.assert_close(model(x), wanted, rtol=0.1, atol=0.1)


def test_nothing_quantized_at_all_is_refused():
    with pytest.raises(ValueError, match="weight_bits and activation_bits are both None"):
        QuantizationScheme(weight_bits=None, activation_bits=None)


def test_groups_without_channels_are_refused():
    with pytest.raises(ValueError, match="group_size=32 divides the weights of each output channel"):
        QuantizationScheme(group_size=32, per_channel=False)


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "edge_bits"])
@pytest.mark.parametrize("bits", [1, 17])
def test_bit_widths_outside_2_to_16_are_refused(name, bits):
    with pytest.raises(ValueError, match=f"{name} must be an integer from 2 to 16, got {bits}"):
        QuantizationScheme(**{name: bits})


@pytest.mark.parametrize("value", ["48", [4], [4, 8, 2], (4, 40)])
def test_malformed_overrides_are_refused(value):
    with pytest.raises(ValueError, match=r"overrides\['a'\]"):
        QuantizationScheme(overrides={"a": value})


def test_autocast_sees_whether_the_model_is_quantized(images):
    """Autocast caches casts of parameters, and the float model's bias is another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    network = calibrated_network(model, calibration_set(model, images))
    with torch.no_grad():
        network.layers["1"].bias.add_(9.0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with network.quantized(False):
            wanted = model(images)
        found = model(images)
        with network.quantized(False):
            again = model(images)
    assert float((found - wanted).mean()) == pytest.approx(9.0, abs=0.1) and torch.equal(again, wanted)


def test_states_are_interpolated_where_they_are_real_numbers():
    inf = float("inf")
    config = LayerConfig()
    first = LayerState(config, None, torch.zeros(2), None, [torch.tensor([inf, 0.0]), torch.tensor([1, 2])])
    last = LayerState(config, None, torch.ones(2), torch.ones(1), [torch.tensor([inf, 4.0]), torch.tensor([3, 2])])
    found = first.lerp(last, 0.25)
    assert found.bias is None and found.weight.tolist() == [0.25, 0.25]
    assert found.qparams[0].tolist() == [inf, 1.0] and found.qparams[1].tolist() == [3, 2]
