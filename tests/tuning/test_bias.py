import pytest
import torch
from torch import nn

from lightning_calibtip.tuning.bias import BiasTuningOptions, falls_beyond_chance, tune_bias
from tests.networks import calibrated_network, calibration_set


@pytest.fixture
def calibrated(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(8))
    network = calibrated_network(tiny_resnet, calibration, weight_bits=2, activation_bits=4)
    # A shift that tuning has to find back.
    with torch.no_grad():
        network.layers["head"].bias.add_(torch.tensor([0.5, -0.5, 0.2, 0.0]))
    return network, calibration


def test_biases_alone_change_and_the_divergence_falls(calibrated):
    network, calibration = calibrated
    before = {name: layer.save() for name, layer in network.layers.items()}
    result = tune_bias(network, calibration, BiasTuningOptions(epochs=20, rate=5e-2))
    assert result.kept and result.divergence_after < 0.3 * result.divergence_before
    for name, layer in network.layers.items():
        assert torch.equal(layer.weight, before[name].weight)
        assert torch.equal(layer.weight_quantizer.scale, before[name].qparams[0])
        assert torch.equal(layer.input_quantizers[0].scale, before[name].qparams[2])
    assert not torch.equal(network.layers["head"].bias, before["head"].bias)
    assert not any(p.requires_grad for p in network.model.blocks[0].conv1.input_quantizers.parameters())


def test_scales_are_tuned_when_asked(calibrated):
    network, calibration = calibrated
    before = network.layers["head"].save()
    tune_bias(network, calibration, BiasTuningOptions(epochs=5, rate=5e-2, scale_rate=1e-2))
    assert not torch.equal(network.layers["head"].weight_quantizer.scale, before.qparams[0])


def test_autocast_sees_every_step_of_the_optimiser(images):
    """Autocast caches casts of parameters: without clearing, each step would compute with the first step's biases."""
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    calibration = calibration_set(model, images)
    network = calibrated_network(model, calibration)

    def note(layer, args, output):
        if output.requires_grad:
            seen.append(output.detach().float())

    model[1].register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        tune_bias(network, calibration, BiasTuningOptions(epochs=3, rate=1.0, holdout=0))
    assert len(seen) == 3
    assert not torch.allclose(seen[0], seen[1], atol=0.05) and not torch.allclose(seen[1], seen[2], atol=0.05)


def test_a_worse_result_is_taken_back(calibrated, caplog):
    network, calibration = calibrated
    before = {name: layer.save() for name, layer in network.layers.items()}
    result = tune_bias(network, calibration, BiasTuningOptions(epochs=1, rate=1e4))
    assert not result.kept and "biases restored" in caplog.text
    assert all(torch.equal(layer.bias, before[name].bias) for name, layer in network.layers.items())


def test_a_gain_within_its_standard_error_is_not_trusted():
    before = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert not falls_beyond_chance(before, torch.tensor([0.0, 1.5, 1.3, 1.1]))
    assert falls_beyond_chance(before, torch.tensor([0.9, 0.8, 0.9, 0.8]))
    assert not falls_beyond_chance(before, before)


def test_single_batch_serves_for_both(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, images)
    network = calibrated_network(tiny_resnet, calibration, weight_bits=2)
    assert tune_bias(network, calibration, BiasTuningOptions(epochs=2)).divergence_before > 0


@pytest.mark.parametrize("name,value", [("epochs", 0), ("rate", -1.0), ("scale_rate", float("nan")), ("holdout", 1.0)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        BiasTuningOptions(**{name: value})
