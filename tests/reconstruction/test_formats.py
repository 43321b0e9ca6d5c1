"""Formats of layers beyond weights per channel with quantized inputs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_calibtip.network.network import QuantizedNetwork
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.quantization.ranges import RangeOptions
from lightning_calibtip.quantization.spec import PerGroup, TensorSpec
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.equalize import equalize
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.reconstruction.units import find_units
from tests.networks import calibrated_network, calibration_set

ROUNDINGS = ["straight_through", "learned"]


def correlated_images(images):
    return torch.nn.functional.interpolate(images[:, :, ::2, ::2], scale_factor=2, mode="bilinear")


def lowers_errors(results):
    before, after = (sum(getattr(result, name) for result in results) for name in ("error_before", "error_after"))
    return after < 0.95 * before


def options(granularity, rounding):
    return AdaQuantOptions(
        granularity=granularity,
        rounding=rounding,
        iterations=200,
        batch_size=16,
        weight_rate=3e-2,
        drop_probability=0.2,
    )


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize(
    "scheme", [{}, {"group_size": 16}, {"per_channel": False}], ids=["channels", "groups", "tensor"]
)
def test_units_with_float_inputs_are_reconstructed(tiny_resnet, images, granularity, rounding, scheme):
    images = correlated_images(images)
    calibration = calibration_set(tiny_resnet, *images.split(16))
    network = calibrated_network(
        tiny_resnet, calibration, weight_bits=2, activation_bits=None, edge_bits=None, **scheme
    )
    units = find_units(network, granularity)
    assert {layer.name for unit in units for layer in unit.layers} == set(network.layers)
    assert all(quantizer is None for layer in network.layers.values() for quantizer in layer.input_quantizers)
    results = adaquant(network, calibration, options(granularity, rounding))
    assert lowers_errors(results)
    for layer in network.layers.values():
        # Everything lies on the grid of integers: 2 bits for each scale.
        codes = layer.integer_weight()
        torch.testing.assert_close(layer.module.weight, layer.weight_quantizer.decode(codes).view_as(layer.weight))
        assert int(codes.min()) >= 0 and int(codes.max()) <= 3


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_in_groups_are_reconstructed_with_quantized_inputs(tiny_resnet, images, rounding):
    """Nine times six weights of a channel in groups of 16: the last has six."""
    calibration = calibration_set(tiny_resnet, *correlated_images(images).split(16))
    network = calibrated_network(tiny_resnet, calibration, weight_bits=2, edge_bits=None, group_size=16)
    layer = network.layers["blocks.0.conv1"]
    assert layer.config.weight.granularity == PerGroup(16, 0) and layer.weight_quantizer.scale.numel() == 6 * 4
    before = layer.weight_quantizer.scale.clone()
    results = adaquant(network, calibration, options("layer", rounding))
    assert lowers_errors(results)
    assert {result.name: result.kept for result in results}["blocks.0.conv1"]
    # Groups of channels that a ReLU has cut off learn nothing.
    assert (layer.weight_quantizer.scale != before).float().mean() > 0.5


def test_activations_alone_are_reconstructed(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    network = calibrated_network(tiny_resnet, calibration, weight_bits=None, activation_bits=2, edge_bits=None)
    weights = {name: layer.weight.clone() for name, layer in network.layers.items()}
    results = adaquant(network, calibration, options("layer", "learned"))
    assert [result.name for result in results] == list(network.layers) and sum(result.kept for result in results) >= 3
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in network.layers.items())


def test_the_quantizer_of_an_output_is_learned_like_that_of_an_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    calibration = calibration_set(model, *(torch.randn(512, 3) @ torch.randn(3, 8)).split(64))
    network = QuantizedNetwork(model, QuantizationScheme(4, 4, edge_bits=None))
    network.prepare(lambda: calibration.run(0))
    layer = network.layers["2"]
    layer.install(replace(layer.config, output=TensorSpec(3)))
    network.attach_observers(RangeOptions("minmax"))
    for index in range(len(calibration)):
        with network.observing(), torch.no_grad():
            calibration.run(index)
    network.fit_ranges()
    before = layer.output_quantizer.scale.clone()
    results = adaquant(network, calibration, options("layer", "straight_through"))
    assert results[-1].name == "2" and results[-1].kept
    assert not torch.equal(layer.output_quantizer.scale, before)
    point = layer.output_quantizer.zero_point
    assert torch.equal(point, point.round())
    with torch.no_grad():
        assert len(torch.unique(torch.cat([calibration.run(index) for index in range(len(calibration))]))) <= 8


def test_a_network_of_doubles_is_reconstructed():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model, rows = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(128, 6)
        calibration = calibration_set(model, rows)
        network = calibrated_network(model, calibration, weight_bits=2, edge_bits=None)
        equalize(network, calibration)
        results = adaquant(network, calibration, AdaQuantOptions(iterations=60))
        assert model(rows).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any("cannot be optimised" in result.note for result in results) and lowers_errors(results)
