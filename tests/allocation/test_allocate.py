import pytest
import torch

from lightning_calibtip.allocation.allocate import allocate
from lightning_calibtip.allocation.integer_program import InfeasibleBudgetError
from lightning_calibtip.allocation.sensitivity import measure_sensitivity
from lightning_calibtip.calibration.logits import kl_divergence
from lightning_calibtip.reconstruction.adaquant import Reconstruction, adaquant
from lightning_calibtip.reconstruction.candidates import adaquant_candidates
from lightning_calibtip.reconstruction.settings import AdaQuantSettings
from tests.networks import calibrated_network, calibration_set

CANDIDATES = [(2, 8), (8, 8)]


@pytest.fixture
def calibrated(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    return calibrated_network(tiny_resnet, calibration, weight_bits=8, activation_bits=8), calibration


def test_sensitivity_is_the_rise_of_the_divergence_with_one_layer_changed(tiny_resnet, images, calibrated):
    network, calibration = calibrated
    table = measure_sensitivity(network, calibration, CANDIDATES)
    assert list(table) == network.free_layers
    with torch.no_grad():
        with network.quantized(False):
            target = [tiny_resnet(images)]
        at_base = float(kl_divergence(tiny_resnet(images), target))
        for name in network.free_layers:
            network.layers[name].take((2, 8))
            alone = float(kl_divergence(tiny_resnet(images), target))
            network.layers[name].take((8, 8))
            assert table[name][2, 8] == pytest.approx(alone - at_base, rel=1e-3, abs=1e-7)
            assert table[name][8, 8] == 0


def test_allocation_stays_within_the_budget_and_spends_bits_where_it_hurts_most(calibrated):
    network, calibration = calibrated
    sizes = {name: layer.weight.numel() for name, layer in network.layers.items()}
    outcome = allocate(network, calibration, CANDIDATES, compression=0.16)
    bits = {name: layer.bits for name, layer in network.layers.items()}
    assert {name: bits[name] for name in network.free_layers} == outcome.bits
    assert bits["stem"] == bits["head"] == (8, 8)
    reached = sum(sizes[name] * bits[name][0] for name in sizes) / (32 * sum(sizes.values()))
    assert outcome.compression == pytest.approx(reached) and reached <= 0.16
    assert set(outcome.bits.values()) == {(2, 8), (8, 8)}
    # All free layers have the same size here, so those at 8 bits must be the most sensitive ones.
    worth = {name: outcome.sensitivity[name][2, 8] for name in network.free_layers}
    wide = [worth[name] for name, widths in outcome.bits.items() if widths == (8, 8)]
    narrow = [worth[name] for name, widths in outcome.bits.items() if widths == (2, 8)]
    assert min(wide) >= max(narrow)


def test_reconstructed_states_are_used_where_there_are_some(calibrated):
    network, calibration = calibrated
    how = Reconstruction(AdaQuantSettings(iterations=20, batch_size=16), "parallel", "layer")
    adaquant_candidates(network, calibration, how, CANDIDATES)
    outcome = allocate(network, calibration, CANDIDATES, compression=0.16)
    for name, widths in outcome.bits.items():
        layer = network.layers[name]
        assert torch.equal(layer.weight, layer.variants[widths].weight)
        assert layer.errors == layer.variants[widths].errors


def test_work_done_before_allocation_is_kept(calibrated):
    network, calibration = calibrated
    settings = AdaQuantSettings(iterations=30, batch_size=16, weight_rate=0.1)
    adaquant(network, calibration, Reconstruction(settings, "parallel", "layer"))
    before = {name: network.layers[name].save() for name in network.free_layers}
    outcome = allocate(network, calibration, CANDIDATES, compression=0.16)
    wide = [name for name, widths in outcome.bits.items() if widths == (8, 8)]
    assert wide and all(torch.equal(network.layers[name].weight, before[name].weight) for name in wide)


def test_unreachable_compression_states_the_range(calibrated):
    network, calibration = calibrated
    with pytest.raises(InfeasibleBudgetError, match=r"compression=0.03 is out of reach: .* 0\.0\d+ to 0\.25"):
        allocate(network, calibration, CANDIDATES, compression=0.03)
    assert all(layer.bits == (8, 8) for layer in network.layers.values())


def test_float_layers_count_with_32_bits(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, images)
    network = calibrated_network(tiny_resnet, calibration, overrides={"blocks.0.*": None})
    with pytest.raises(InfeasibleBudgetError):
        allocate(network, calibration, CANDIDATES, compression=0.3)


def test_nothing_free_to_choose_is_an_error(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, images)
    network = calibrated_network(tiny_resnet, calibration, overrides={"*": 8})
    with pytest.raises(ValueError, match="No layer's width is free"):
        allocate(network, calibration, CANDIDATES, compression=0.3)
