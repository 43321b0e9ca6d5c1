import pytest
import torch
from torch import nn

from lightning_calibtip import CalibTIP, QuantizationModule, QuantizationScheme
from lightning_calibtip.network.targets import Target, find_target
from tests.networks import calibrated_network, calibration_set

ENGINES = ("onnxruntime", "openvino", "tensorrt", "xnnpack")


@pytest.mark.parametrize("options, message", [
    ({"target": "cpu"}, "target must be one of onnxruntime, openvino, .* got 'cpu'; register_target"),
    ({"target": "onnxruntime", "per_token": True}, "per_token=True .* target='onnxruntime' cannot run: leave it out"),
    ({"target": "onnxruntime", "symmetric": False}, "symmetric=False .* leave it out, or give target=None"),
    ({"target": "openvino", "group_size": 32}, "group_size=32: target='openvino' .* or target='weights'"),
    ({"target": "onnxruntime", "activation_symmetric": True}, "activation_symmetric=True: .*leave it out"),
    ({"target": "onnxruntime", "weight_bits": 9}, "does not run weights at 9 bits; give one of 2, 3, .*8"),
    ({"target": "onnxruntime", "edge_bits": 12}, "edge_bits: .* weights at 12 bits"),
    ({"target": "tensorrt", "weight_bits": 4}, "target='tensorrt' does not run weights at 4 bits; give one of 8"),
    ({"target": "xnnpack", "overrides": {"0": (8, 4)}}, r"overrides\['0'\]: .* activations at 4 bits"),
    ({"target": "weights"}, "target='weights' does not run activations at 8 bits; give None, for float"),
    ({"target": 3}, "target must be one of .* got 3"),
])  # fmt: skip
def test_what_a_target_cannot_run_is_refused_at_construction(options, message):
    model = nn.Sequential(nn.Linear(2, 2))
    for make in (QuantizationScheme, lambda **o: QuantizationModule(model, **o), lambda **o: CalibTIP(**o)):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_a_target_needs_a_name():
    with pytest.raises(ValueError, match="needs a name"):
        Target("")


def layers_of(target, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 3)).eval()
    calibration = calibration_set(model, torch.randn(16, 2, 6, 6))
    return calibrated_network(model, calibration, target=target, weight_bits=8, activation_bits=8, **options).layers


@pytest.mark.parametrize("target", ENGINES)
def test_engines_get_symmetric_weights_and_activations_that_they_know(target):
    for layer in layers_of(target).values():
        assert layer.config.weight.symmetric and layer.weight_quantizer.zero_point.abs().max() == 0
        (spec,) = layer.config.inputs
        assert spec.symmetric == (target == "tensorrt") and layer.config.integer_bias
        if target == "tensorrt":
            assert layer.input_quantizers[0].zero_point.item() == 0


def test_without_a_target_nothing_is_different():
    for layer in layers_of(None).values():
        assert not layer.config.weight.symmetric and layer.config.output is None and not layer.config.integer_bias


def test_biases_are_whole_numbers_of_the_products_steps_while_the_layer_runs():
    layers = layers_of("onnxruntime")
    layer = layers["2"]
    seen = []
    layer.module.register_forward_hook(lambda m, a, o: seen.append(m.bias), prepend=True)
    x = torch.randn(2, 4, 4, 4)
    latent = layer.bias.detach().clone()
    layer.module(x)
    step = (layer.input_quantizers[0].scale * layer.weight_quantizer.scale).detach()
    acting = seen[0].detach()
    whole = acting / step
    assert torch.equal(acting, layer.acting_bias()) and not torch.equal(acting, latent)
    # Division in float32 leaves a few units of the last place.
    assert (whole - whole.round()).abs().max() < 1e-3 and (acting - latent).abs().max() <= 0.5001 * step.max()
    assert torch.equal(layer.bias.detach(), latent)
    layer.set_enabled(False)
    layer.module(x)
    assert torch.equal(seen[1].detach(), latent)


def test_the_latent_bias_learns_straight_through():
    layer = layers_of("onnxruntime")["2"]
    layer.bias.requires_grad_(True)
    layer.module(torch.randn(2, 4, 4, 4)).square().sum().backward()
    assert layer.bias.grad.abs().min() > 0


def test_a_failing_layer_keeps_its_latent_bias():
    layer = layers_of("onnxruntime")["2"]
    latent = layer.bias
    with pytest.raises(RuntimeError):
        layer.module(torch.randn(2, 3, 4, 4))
    assert layer.bias is latent


def test_the_engines_of_a_checkpoint_come_back_with_it(make_trainer, loader, tiny_classifier, images, tmp_path):
    from lightning_calibtip import Calibration
    from tests.conftest import TinyClassifier

    module = QuantizationModule(tiny_classifier, weight_bits=4, target="onnxruntime")
    trainer = make_trainer(Calibration())
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "q.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "q.ckpt", model=TinyClassifier())
    assert loaded.network.plan == module.network.plan and loaded.network.scheme.target == "onnxruntime"
    assert any(name.endswith("addition_0") for name in loaded.network.layers)
    with torch.no_grad():
        assert torch.equal(loaded(images), module(images))


def test_targets_are_frozen_values():
    assert find_target("openvino") != find_target("onnxruntime")
    assert find_target("weights").activation_bits == ()
