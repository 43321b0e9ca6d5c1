import pytest
import torch
from torch import nn

from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.learned_rounding import (
    LearnedRounding,
    hard_rounding,
    rounding_regulariser,
    soft_rounding,
)
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.reconstruction.rounding import RoundingPenalty
from tests.networks import calibrated_network, calibration_set


@pytest.fixture(params=[{}, {"group_size": 4}, {"per_channel": False}], ids=["channels", "groups", "tensor"])
def layer(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    calibration = calibration_set(model, torch.randn(32, 6))
    return calibrated_network(model, calibration, weight_bits=3, edge_bits=None, **request.param).layers["0"]


def along(layer, parameter):
    """Scales or zero points, one for each weight; groups of four are four weights and the two that are left."""
    if parameter.numel() == 10:
        return torch.cat([parameter.view(5, 2)[:, :1].expand(5, 4), parameter.view(5, 2)[:, 1:].expand(5, 2)], 1)
    return parameter.view(-1, 1).expand(5, 6)


def test_at_first_nothing_is_rounded(layer):
    rounding, quantizer = LearnedRounding(layer), layer.weight_quantizer
    scale, point = along(layer, quantizer.scale), along(layer, quantizer.zero_point)
    low, high = ((end - point) * scale for end in (quantizer.spec.qmin, quantizer.spec.qmax))
    with rounding.acting():
        torch.testing.assert_close(layer.module.weight, layer.weight.clamp(low, high), atol=2e-4, rtol=0)


def test_at_the_end_each_weight_is_at_a_neighbour_on_the_grid_as_its_variable_says(layer):
    before = layer.weight.clone()
    quantizer = layer.weight_quantizer
    scale = along(layer, quantizer.scale)
    rounding = LearnedRounding(layer)
    with rounding.acting():
        with torch.no_grad():
            rounding.variable.copy_(torch.where(torch.arange(30).view(5, 6) % 2 == 0, 3.0, -3.0))
        inside = layer.module.weight.clone()
    assert layer.weight_quantizer is quantizer is layer.module.parametrizations.weight[0]
    # Fake quantization of the new latent weight is what the variables stood for.
    torch.testing.assert_close(layer.module.weight, inside)
    torch.testing.assert_close(layer.module.weight, layer.weight)
    low, high = (
        (end - along(layer, quantizer.zero_point)) * scale for end in (quantizer.spec.qmin, quantizer.spec.qmax)
    )
    inner = (before > low + scale) & (before < high - scale)
    assert inner.sum() > 5
    up = (torch.arange(30).view(5, 6) % 2 == 0) & inner
    down = (torch.arange(30).view(5, 6) % 2 == 1) & inner
    assert ((layer.weight - before)[up] >= -1e-6).all() and ((layer.weight - before)[down] <= 1e-6).all()
    assert ((layer.weight - before).abs() <= scale + 1e-6)[inner].all()


def test_the_quantizer_comes_back_also_after_an_error(layer):
    quantizer = layer.weight_quantizer
    with pytest.raises(ZeroDivisionError), LearnedRounding(layer).acting():
        1 / 0  # noqa: B018
    assert layer.module.parametrizations.weight[0] is quantizer


def test_soft_rounding_reaches_what_hard_rounding_says():
    far = torch.tensor([-9.0, -4.0, 4.0, 9.0])
    assert torch.equal(soft_rounding(far), hard_rounding(far))
    assert soft_rounding(torch.zeros(1)).item() == pytest.approx(0.5)


def test_the_regulariser_waits_and_then_drives_to_a_decision(layer):
    rounding = LearnedRounding(layer)
    penalty = RoundingPenalty([rounding], strength=2.0).penalty
    assert penalty(0.1) is None and rounding_regulariser(rounding.variable, 0.1) is None
    with torch.no_grad():
        rounding.variable.fill_(0.0)
    assert penalty(0.5).item() == pytest.approx(2.0)
    with torch.no_grad():
        rounding.variable.fill_(9.0)
    assert penalty(0.5).item() == pytest.approx(0.0)
    with torch.no_grad():
        rounding.variable.copy_(torch.linspace(-2, 2, 30).view(5, 6))
    penalty(0.9).backward()
    pull = -rounding.variable.grad
    assert (pull[rounding.variable.abs() > 0.1].sign() == rounding.variable[rounding.variable.abs() > 0.1].sign()).all()


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_learned_rounding_lowers_held_out_errors(tiny_resnet, images, granularity):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    network = calibrated_network(tiny_resnet, calibration, weight_bits=3, activation_bits=8)
    before = {name: layer.save() for name, layer in network.layers.items()}
    results = adaquant(
        network,
        calibration,
        AdaQuantOptions(
            granularity=granularity, iterations=200, batch_size=16, rounding="learned", weight_range_rate=0
        ),
    )
    kept = {name for result in results if result.kept for name in result.layers}
    assert set(network.searchable_layers) & kept
    for name in kept:
        layer, state = network.layers[name], before[name]
        quantizer = layer.weight_quantizer
        # No weight is farther from where it was than a step, and each lies on the grid.
        moved = (layer.module.weight - state.weight.clamp(*weight_ends(quantizer))).abs()
        assert (moved <= quantizer.scale.view(-1, *[1] * (moved.dim() - 1)) * 1.001).all()
        assert not torch.equal(layer.module.weight, quantizer(state.weight))
    assert sum(result.error_after for result in results) < 0.9 * sum(result.error_before for result in results)


def weight_ends(quantizer):
    shape = (-1, 1) if quantizer.name.startswith("head") else (-1, 1, 1, 1)
    ends = (quantizer.spec.qmin, quantizer.spec.qmax)
    return tuple(((end - quantizer.zero_point) * quantizer.scale).view(shape) for end in ends)
