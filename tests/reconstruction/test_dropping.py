import copy

import torch

from lightning_calibtip.calibration.recording import UnitCall
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.dropping import Dropping, dropping
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.networks import calibrated_network, calibration_set


def test_the_given_share_of_the_elements_is_float(tiny_resnet, images, generator):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    network = calibrated_network(tiny_resnet, calibration, activation_bits=2)
    layer, x = network.layers["blocks.0.conv1"], torch.rand(64, 6, 8, 8, generator=generator)
    quantized = layer.input_quantizers[0](x)
    with dropping([layer], Dropping(0.3, generator)):
        first, second = layer.input_quantizers[0](x), layer.input_quantizers[0](x)
    is_float = first == x
    assert torch.equal(first[~is_float], quantized[~is_float])
    assert abs(float(is_float.float().mean()) - 0.3) < 0.02
    assert not torch.equal(first, second)
    assert torch.equal(layer.input_quantizers[0](x), quantized)


def test_arguments_are_mixed_of_both_models(generator):
    exact = UnitCall((torch.ones(1000), 3), {"mask": torch.ones(2, dtype=torch.bool)})
    rounded = UnitCall((torch.zeros(1000), 3), {"mask": torch.zeros(2, dtype=torch.bool)})
    mixed = Dropping(0.25, generator).mix(rounded, exact)
    assert 0.15 < float(mixed.args[0].mean()) < 0.35
    assert mixed.args[1] == 3 and not mixed.kwargs["mask"].any()
    assert Dropping(0.25, generator).mix(rounded, None) is rounded


def test_what_is_dropped_changes_the_result_and_is_drawn_from_the_seed(tiny_resnet, images):
    weights = []
    for probability in (0.5, 0.5, 0.0):
        model = copy.deepcopy(tiny_resnet)
        calibration = calibration_set(model, *images.split(16))
        network = calibrated_network(model, calibration, weight_bits=3, activation_bits=3)
        adaquant(network, calibration, AdaQuantOptions(iterations=20, batch_size=16, drop_probability=probability))
        weights.append([layer.weight.clone() for layer in network.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
