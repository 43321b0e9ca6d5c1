import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.quantization.spec import BitWidths
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.candidates import adaquant_candidates
from lightning_calibtip.reconstruction.optimize import optimize_unit
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests import transformer_models as models
from tests.networks import calibrated_network, calibration_set

BY_LAYERS = AdaQuantOptions("parallel", "layer", iterations=20, batch_size=16)
W2A4, W2A8, W8A8 = BitWidths(2, 4), BitWidths(2, 8), BitWidths(8, 8)


@pytest.fixture
def calibrated(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    return calibrated_network(tiny_resnet, calibration, weight_bits=2, activation_bits=4), calibration


def optimised_units(monkeypatch):
    """Names of the units that are optimised from now on."""
    seen = []

    def noting(unit, *args):
        seen.append(unit.name)
        return optimize_unit(unit, *args)

    monkeypatch.setattr("lightning_calibtip.reconstruction.adaquant.optimize_unit", noting)
    return seen


def test_candidates_leave_a_state_for_each_format(calibrated):
    network, calibration = calibrated
    results = adaquant_candidates(network, calibration, BY_LAYERS, [W2A4, W8A8])
    assert list(results) == [W2A4, W8A8]
    assert all([result.name for result in of_one] == list(network.layers) for of_one in results.values())
    for name in network.searchable_layers:
        layer = network.layers[name]
        narrow, wide = (network.config_for(name, candidate) for candidate in (W2A4, W8A8))
        assert set(layer.variants) == {narrow, wide} and layer.config == narrow
        assert layer.variants[narrow].errors[1] > layer.variants[wide].errors[1]
        layer.switch(wide)
        assert layer.config == wide and torch.equal(layer.weight, layer.variants[wide].weight)
    assert network.layers["stem"].config.bit_widths == W8A8 and not network.layers["stem"].variants


def test_each_candidate_has_the_states_of_a_reconstruction_of_its_own(tiny_resnet, images):
    def network_of(bit_widths):
        model = copy.deepcopy(tiny_resnet)
        calibration = calibration_set(model, *images.split(16))
        scheme = {"weight_bits": bit_widths.weight, "activation_bits": bit_widths.activation}
        return calibrated_network(model, calibration, **scheme), calibration

    together, calibration = network_of(W2A4)
    results = adaquant_candidates(together, calibration, BY_LAYERS, [W2A4, W8A8])
    for candidate in (W2A4, W8A8):
        alone, calibration = network_of(candidate)
        wanted = adaquant(alone, calibration, BY_LAYERS)
        assert [(r.name, r.error_after) for r in results[candidate]] == [(r.name, r.error_after) for r in wanted]
        for name in together.searchable_layers:
            together.switch(name, candidate)
        for layer, other in zip(together.layers.values(), alone.layers.values(), strict=True):
            assert torch.equal(layer.weight, other.weight), layer.name
            assert all(map(torch.equal, layer.save().qparams, other.save().qparams)), layer.name


def test_the_float_model_is_walked_once_for_all_candidates(calibrated):
    network, calibration = calibrated
    passes = Counter()

    def count(module, args, output):
        if not network.layers["head"].enabled:
            passes[id(module)] += 1

    # Modules without units: they run in the streams alone.
    for module in network.model.modules():
        if not list(module.children()) and not list(module.parameters()):
            module.register_forward_hook(count)
    counts = []
    for candidates in ([W2A4], [W2A4, W2A8, W8A8]):
        passes.clear()
        adaquant_candidates(network, calibration, BY_LAYERS, candidates)
        counts.append(dict(passes))
    assert counts[0] and counts[0] == counts[1]


def test_pinned_layers_and_equal_formats_are_reconstructed_once(calibrated, monkeypatch):
    network, calibration = calibrated
    seen = optimised_units(monkeypatch)
    adaquant_candidates(network, calibration, BY_LAYERS, [W2A4, W2A4, W8A8])
    assert Counter(seen) == {name: 1 if name in ("stem", "head") else 2 for name in network.layers}


def test_a_product_is_reconstructed_once_for_candidates_that_differ_in_weights_alone(monkeypatch):
    model = models.distilbert().eval()
    calibration = CalibrationSet(lambda batch, index: model(**batch))
    for batch in models.batches_of(models.padded_tokens()):
        calibration.append(batch)
    network = calibrated_network(model, calibration, edge_bits=None)
    seen = optimised_units(monkeypatch)
    candidates = [BitWidths(4, 8), W8A8, BitWidths(8, None)]
    results = adaquant_candidates(network, calibration, replace(BY_LAYERS, iterations=1), candidates)
    counts = Counter(seen)
    products = [name for name in counts if name.endswith("_product")]
    assert len(products) == 4 and all(counts[name] == 1 for name in products), "at W8 a product stays in float"
    assert {counts[name] for name in counts if name not in products} == {3}
    assert [len(results[candidate]) for candidate in candidates] == [len(counts), len(counts), len(counts) - 4]


def test_what_several_layers_read_keeps_its_range():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.left(x) + self.right(x)

    torch.manual_seed(0)
    model = Fork().eval()
    calibration = calibration_set(model, *(torch.randn(512, 3) @ torch.randn(3, 8)).split(64))
    network = calibrated_network(model, calibration, weight_bits=2, edge_bits=None)
    left, right = network.layers["left"], network.layers["right"]
    quantizer = left.input_quantizers[0]
    assert right.input_quantizers[0] is quantizer
    before = [parameter.clone() for parameter in quantizer.parameters()]
    own = network.layers["first"].input_quantizers[0].scale.clone()
    adaquant_candidates(network, calibration, replace(BY_LAYERS, iterations=100), [BitWidths(2, 4), W8A8])
    assert left.config.bit_widths == BitWidths(2, 4) and left.input_quantizers[0] is quantizer
    assert all(torch.equal(was, now) for was, now in zip(before, quantizer.parameters(), strict=True))
    assert not torch.equal(network.layers["first"].input_quantizers[0].scale, own)


@pytest.mark.parametrize(
    "options,candidates",
    [
        (AdaQuantOptions(), [W8A8]),
        (AdaQuantOptions("parallel"), [W8A8]),
        (AdaQuantOptions("parallel", "layer", ["blocks.0"]), [W8A8]),
        (BY_LAYERS, []),
    ],
)
def test_states_that_could_not_be_mixed_are_refused(calibrated, options, candidates):
    with pytest.raises(ValueError, match="states that were reconstructed together cannot be mixed"):
        adaquant_candidates(*calibrated, options, candidates)
