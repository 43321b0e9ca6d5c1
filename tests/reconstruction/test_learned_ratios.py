import pytest
import torch

from lightning_calibtip.quantization.spec import BitWidths
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.candidates import adaquant_candidates
from lightning_calibtip.reconstruction.equalizable import EqualizationOptions
from lightning_calibtip.reconstruction.equalize import equalize
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.uneven import ROWS, error, linear, uneven_network

MANY = torch.randn(512, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def put_back(monkeypatch):
    """Equalization is never better."""
    monkeypatch.setattr(
        "lightning_calibtip.reconstruction.equalize.measure_divergences", lambda *args: torch.tensor([1.0])
    )


def test_reconstruction_goes_on_learning_the_ratios():
    errors = {}
    for ratio_rate in (0.0, 0.05):
        network, calibration = uneven_network(linear(), MANY, weight_bits=3)
        equalize(network, calibration)
        first = network.layers["2"].input_ratio.detach().clone()
        results = adaquant(network, calibration, AdaQuantOptions(iterations=150, ratio_rate=ratio_rate))
        assert results[-1].kept and results[-1].error_after < results[-1].error_before
        assert torch.equal(network.layers["2"].input_ratio, first) == (ratio_rate == 0)
        errors[ratio_rate] = error(network, MANY)
    assert errors[0.05] < errors[0.0]
    # What the weights took in while it learned is in them for good.
    places = [layer.module.parametrizations["weight"] for layer in network.layers.values()]
    assert all(place[0] is layer.weight_quantizer for place, layer in zip(places, network.layers.values(), strict=True))


def test_ratios_that_do_not_learn_stay():
    for options in ({"ratio_rate": 0.0}, {"rounding": "learned"}):
        network, calibration = uneven_network(linear(), ROWS, weight_bits=4)
        equalize(network, calibration)
        first = network.layers["2"].input_ratio.detach().clone()
        adaquant(network, calibration, AdaQuantOptions(iterations=10, **options))
        assert torch.equal(network.layers["2"].input_ratio, first)


@pytest.mark.usefixtures("put_back")
def test_inputs_that_are_not_equalized_begin_with_ratios_of_1():
    network, calibration = uneven_network(linear(), MANY, weight_bits=3)
    assert not equalize(network, calibration).kept
    layer, before = network.layers["2"], error(network, MANY)
    assert layer.input_ratio is None
    adaquant(network, calibration, AdaQuantOptions(iterations=150))
    assert layer.input_ratio is not None and layer.input_ratio.std() > 0.01
    assert error(network, MANY) < 0.7 * before
    network, calibration = uneven_network(linear(), MANY, weight_bits=3)
    equalize(network, calibration)
    adaquant(network, calibration, AdaQuantOptions(iterations=10, ratio_rate=0.0))
    assert network.layers["2"].input_ratio is None


@pytest.mark.usefixtures("put_back")
def test_a_unit_that_is_put_back_has_no_ratios(monkeypatch):
    network, calibration = uneven_network(linear(), ROWS, weight_bits=3)
    equalize(network, calibration)
    with torch.no_grad():
        before = network.model(ROWS)
    results = adaquant(network, calibration, AdaQuantOptions(iterations=5, weight_rate=1e6))
    assert not any(result.kept for result in results)
    assert all(layer.input_ratio is None for layer in network.layers.values())
    with torch.no_grad():
        assert torch.equal(network.model(ROWS), before)


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize(
    "end",
    [
        lambda network: network.fit_ranges(),
        lambda network: network.reset_to_float(),
        lambda network: network.adopt(network.plan),
    ],
)
def test_no_ratios_are_given_after_equalization_has_ended(end):
    network, calibration = uneven_network(linear(), ROWS, weight_bits=3)
    equalize(network, calibration)
    end(network)
    adaquant(network, calibration, AdaQuantOptions(iterations=5))
    assert all(layer.input_ratio is None for layer in network.layers.values())


def test_no_ratios_are_given_without_equalization_nor_to_candidates():
    network, calibration = uneven_network(linear(), ROWS, weight_bits=3)
    adaquant(network, calibration, AdaQuantOptions(iterations=5))
    assert all(layer.input_ratio is None for layer in network.layers.values())
    equalize(network, calibration)
    widths = [BitWidths(4, 4), BitWidths(8, 8)]
    adaquant_candidates(network, calibration, AdaQuantOptions("parallel", "layer", iterations=5), widths)
    assert all(layer.input_ratio is None for layer in network.layers.values())
    assert all(not config.inputs[0].equalized for layer in network.layers.values() for config in layer.variants)


@pytest.mark.usefixtures("put_back")
def test_another_set_of_inputs_that_may_learn_is_another_run(tmp_path):
    network, calibration = uneven_network(linear(), ROWS, weight_bits=3)
    options = AdaQuantOptions(iterations=2)
    adaquant(network, calibration, options, state_folder=tmp_path)
    network, calibration = uneven_network(linear(), ROWS, weight_bits=3)
    equalize(network, calibration)
    with pytest.raises(ValueError, match="another inputs with ratios to learn,"):
        adaquant(network, calibration, options, state_folder=tmp_path)


@pytest.mark.parametrize("kept", [True, False])
def test_ratios_learn_beside_integer_biases(monkeypatch, kept):
    if not kept:
        monkeypatch.setattr(
            "lightning_calibtip.reconstruction.equalize.measure_divergences", lambda *args: torch.tensor([1.0])
        )
    network, calibration = uneven_network(linear(), MANY, weight_bits=4, activation_bits=8, target="onnxruntime")
    assert all(layer.config.integer_bias for layer in network.layers.values())
    assert equalize(network, calibration).kept == kept
    results = adaquant(network, calibration, AdaQuantOptions(iterations=20))
    assert not [result.note for result in results if "cannot be optimised" in result.note]
    assert network.layers["2"].input_ratio is not None


@pytest.mark.usefixtures("put_back")
def test_a_second_equalization_decides_anew():
    network, calibration = uneven_network(linear(), MANY, weight_bits=3)
    equalize(network, calibration)
    equalize(network, calibration, EqualizationOptions(absorb="only"))
    adaquant(network, calibration, AdaQuantOptions(iterations=5))
    assert network.layers["0"].input_ratio is None


def test_ratios_learn_beside_ranges_of_each_token():
    network, calibration = uneven_network(linear(), MANY, weight_bits=3, per_token=True)
    equalize(network, calibration)
    before = error(network, MANY)
    first = network.layers["2"].input_ratio.detach().clone()
    results = adaquant(network, calibration, AdaQuantOptions(iterations=100))
    assert not [result.note for result in results if "cannot be optimised" in result.note]
    assert error(network, MANY) < before and not torch.equal(network.layers["2"].input_ratio, first)
