import pytest
import torch
from torch import nn

from lightning_calibtip.reconstruction.adaquant import Reconstruction, adaquant
from lightning_calibtip.reconstruction.rounding import LearnedRounding, learned_rounding, undecided
from lightning_calibtip.reconstruction.settings import AdaQuantSettings
from tests.networks import calibrated_network, calibration_set


@pytest.fixture
def layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    calibration = calibration_set(model, torch.randn(32, 6))
    return calibrated_network(model, calibration, weight_bits=3, edge_bits=None).layers["0"]


def test_at_first_nothing_is_rounded(layer):
    rounding = LearnedRounding(layer.weight_quantizer, layer.weight)
    on = layer.weight_quantizer
    low, high = ((end - on.zero_point) * on.scale for end in (on.qmin, on.qmax))
    clipped = layer.weight.clamp(low.view(-1, 1), high.view(-1, 1))
    torch.testing.assert_close(rounding(layer.weight), clipped, atol=2e-4, rtol=0)


def test_at_the_end_each_weight_is_at_a_neighbour_on_the_grid_as_its_variable_says(layer):
    before = layer.weight.clone()
    scale = layer.weight_quantizer.scale.view(-1, 1)
    with learned_rounding([layer]) as (rounding,):
        with torch.no_grad():
            rounding.variable.copy_(torch.where(torch.arange(30).view(5, 6) % 2 == 0, 3.0, -3.0))
        inside = layer.module.weight.clone()
    assert layer.weight_quantizer is rounding.quantizer
    # Fake quantization of the new latent weight is what the variables stood for.
    torch.testing.assert_close(layer.module.weight, inside)
    torch.testing.assert_close(layer.module.weight, layer.weight)
    inner = (before > layer.weight.amin(1, keepdim=True)) & (before < layer.weight.amax(1, keepdim=True))
    assert inner.sum() > 10
    up = (torch.arange(30).view(5, 6) % 2 == 0) & inner
    down = (torch.arange(30).view(5, 6) % 2 == 1) & inner
    assert ((layer.weight - before)[up] >= -1e-6).all() and ((layer.weight - before)[down] <= 1e-6).all()
    assert ((layer.weight - before).abs() <= scale + 1e-6)[inner].all()


def test_the_quantizer_comes_back_also_after_an_error(layer):
    quantizer = layer.weight_quantizer
    with pytest.raises(ZeroDivisionError), learned_rounding([layer]):
        1 / 0  # noqa: B018
    assert layer.weight_quantizer is quantizer


def test_the_regulariser_waits_and_then_drives_to_a_decision(layer):
    rounding = LearnedRounding(layer.weight_quantizer, layer.weight)
    assert undecided([rounding], 0.1) is None
    with torch.no_grad():
        rounding.variable.fill_(0.0)
    assert undecided([rounding], 0.5).item() == pytest.approx(1.0)
    with torch.no_grad():
        rounding.variable.fill_(9.0)
    assert undecided([rounding], 0.5).item() == pytest.approx(0.0)
    with torch.no_grad():
        rounding.variable.copy_(torch.linspace(-2, 2, 30).view(5, 6))
    undecided([rounding], 0.9).backward()
    pull = -rounding.variable.grad
    assert (pull[rounding.variable.abs() > 0.1].sign() == rounding.variable[rounding.variable.abs() > 0.1].sign()).all()


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_learned_rounding_lowers_held_out_errors(tiny_resnet, images, granularity):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    network = calibrated_network(tiny_resnet, calibration, weight_bits=3, activation_bits=8)
    before = {name: layer.save() for name, layer in network.layers.items()}
    settings = AdaQuantSettings(iterations=200, batch_size=16, rounding="learned", weight_range_rate=0)
    results = adaquant(network, calibration, Reconstruction(settings, granularity=granularity))
    kept = {name for result in results if result.kept for name in result.layers}
    assert set(network.free_layers) & kept
    for name in kept:
        layer, state = network.layers[name], before[name]
        on = layer.weight_quantizer
        # No weight is farther from where it was than a step, and each lies on the grid.
        moved = (layer.module.weight - state.weight.clamp(*weight_ends(on))).abs()
        assert (moved <= on.scale.view(-1, *[1] * (moved.dim() - 1)) * 1.001).all()
        assert not torch.equal(layer.module.weight, on(state.weight))
    assert sum(result.error_after for result in results) < 0.9 * sum(result.error_before for result in results)


def weight_ends(quantizer):
    shape = (-1, 1) if quantizer.name.startswith("head") else (-1, 1, 1, 1)
    return tuple(
        ((end - quantizer.zero_point) * quantizer.scale).view(shape) for end in (quantizer.qmin, quantizer.qmax)
    )
