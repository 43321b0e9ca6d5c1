import math

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


class OwnAutocast(nn.Sequential):
    """Autocast of the model's own keeps casts, whatever is set around it."""

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [nn.Sequential, OwnAutocast])
def test_autocast_sees_every_step_of_the_optimiser(images, kind):
    """Autocast caches casts of parameters: without clearing, each step would compute with the first step's biases."""
    seen = []
    torch.manual_seed(0)
    model = kind(nn.Flatten(), nn.Linear(64, 4))
    calibration = calibration_set(model, images)
    network = calibrated_network(model, calibration)
    # Far away, so that the first epoch helps.
    with torch.no_grad():
        network.layers["1"].bias[0] -= 9.0

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


def test_what_does_not_help_in_the_first_epoch_is_given_up(calibrated, caplog):
    network, calibration = calibrated
    before = {name: layer.save() for name, layer in network.layers.items()}
    required = [parameter.requires_grad for parameter in network.model.parameters()]
    steps = []
    progress = lambda done, total, what: steps.append((done, total))  # noqa: E731
    result = tune_bias(network, calibration, BiasTuningOptions(epochs=4, rate=1e4), progress)
    (done, total) = steps[-1]
    assert done * 4 == total and not result.kept and "in the first epoch" in caplog.text
    assert all(torch.equal(layer.bias, before[name].bias) for name, layer in network.layers.items())
    assert [parameter.requires_grad for parameter in network.model.parameters()] == required


def test_an_error_on_the_way_leaves_the_model_as_it_was(calibrated):
    network, calibration = calibrated
    before = {name: layer.save() for name, layer in network.layers.items()}

    def stop_at_third(done, total, what):
        if done == 3:
            assert not torch.equal(network.layers["head"].bias, before["head"].bias)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_bias(network, calibration, BiasTuningOptions(rate=5e-2, scale_rate=1e-2), stop_at_third)
    for name, layer in network.layers.items():
        assert torch.equal(layer.bias, before[name].bias)
        found = layer.save().qparams
        assert all(torch.equal(a, b) for a, b in zip(found, before[name].qparams, strict=True))


class TwoReaders(nn.Module):
    """Two layers read one tensor, and so share its quantizer."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 4), nn.Linear(64, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.left(x) + self.right(x)


@pytest.mark.parametrize("group_size", [None, 16])
def test_each_scale_is_tuned_once_also_those_of_groups_and_of_a_shared_input(images, monkeypatch, group_size):
    groups = []

    class Watched(torch.optim.Adam):
        def __init__(self, given):
            groups.extend(given)
            super().__init__(given)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    torch.manual_seed(0)
    model = TwoReaders().eval()
    calibration = calibration_set(model, *images.split(16))
    network = calibrated_network(model, calibration, weight_bits=3, edge_bits=None, group_size=group_size)
    left, right = network.layers["left"], network.layers["right"]
    assert left.input_quantizers == right.input_quantizers
    tune_bias(network, calibration, BiasTuningOptions(epochs=1, scale_rate=1e-2))
    tuned = [parameter for group in groups for parameter in group["params"]]
    own = [left.bias, left.weight_quantizer.scale, left.input_quantizers[0].scale]
    assert [id(p) for p in tuned] == [id(p) for p in [*own, right.bias, right.weight_quantizer.scale]]
    assert len(left.weight_quantizer.scale) == (4 if group_size is None else 16)


def test_layers_without_biases_or_scales_are_left_alone(images, caplog):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))
    calibration = calibration_set(model, images)
    network = calibrated_network(model, calibration)
    runs = []
    calibration.forward = lambda batch, index: runs.append(index) or model(batch)
    result = tune_bias(network, calibration)
    assert not result.kept and math.isnan(result.divergence_before) and math.isnan(result.divergence_after)
    assert not caplog.text and not runs


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


@pytest.mark.parametrize("rates", [{"rate": 1e38}, {"rate": 1e38, "scale_rate": 1e38}])
def test_a_rate_that_no_number_holds_is_put_back(calibrated, rates):
    network, calibration = calibrated
    before = {name: layer.save() for name, layer in network.layers.items()}
    assert not tune_bias(network, calibration, BiasTuningOptions(epochs=1, **rates)).kept
    for name, layer in network.layers.items():
        assert torch.equal(layer.bias, before[name].bias)
