from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.reconstruction.units import find_units
from tests.networks import calibrated_network, calibration_set

QUICK = AdaQuantOptions(iterations=40, batch_size=16)


@pytest.fixture
def calibrated(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    return calibrated_network(tiny_resnet, calibration, weight_bits=2, activation_bits=4), calibration


def test_units_of_layers_carry_the_activation_that_follows(calibrated):
    network, _ = calibrated
    units = {unit.name: unit for unit in find_units(network, "layer")}
    assert list(units) == [
        "stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "head",
    ]  # fmt: skip
    x = torch.linspace(-1, 1, 5)
    for name in ("stem", "blocks.0.conv1", "blocks.1.conv1"):
        assert torch.equal(units[name].activation(x), F.relu(x))
    for name in ("blocks.0.conv2", "head"):
        assert units[name].activation is None


def test_units_of_blocks_hold_each_layer_once(calibrated):
    network, _ = calibrated
    units = find_units(network, "block")
    assert [unit.name for unit in units] == ["stem", "blocks.0", "blocks.1", "head"]
    assert sorted(layer.name for unit in units for layer in unit.layers) == sorted(network.layers)


def test_named_blocks_are_units_and_the_rest_stays_as_it_was_found(calibrated):
    network, calibration = calibrated
    assert [unit.name for unit in find_units(network, "layer", ["blocks.1"])] == [
        "stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1", "head",
    ]  # fmt: skip
    assert [unit.name for unit in find_units(network, "block", ["blocks"])] == ["stem", "blocks", "head"]
    results = adaquant(network, calibration, replace(QUICK, granularity="layer", blocks=["blocks.*1"]))
    assert results[3].layers == ("blocks.1.conv1", "blocks.1.conv2")


@pytest.mark.parametrize(
    "names,message",
    [
        (["layer9"], r"'layer9' matches no module that runs and holds quantized layers; these are: blocks, blocks.0"),
        (["head"], "'head' matches no module"),
        (["blocks*"], r"blocks\.0 lies inside blocks; name one of them"),
    ],
)
def test_names_of_blocks_that_cannot_be_units_are_refused(calibrated, names, message):
    with pytest.raises(ValueError, match=message):
        find_units(calibrated[0], "layer", names)
