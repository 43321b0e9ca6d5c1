import pytest
import torch
from torch import nn

from lightning_calibtip import (
    AdaQuant,
    Calibration,
    Equalization,
    QuantizationModule,
    export_packed,
    load_packed,
    run_stages,
)
from lightning_calibtip.quantization.spec import BitWidths
from lightning_calibtip.reconstruction.candidates import adaquant_candidates
from lightning_calibtip.reconstruction.equalizable import EqualizationOptions
from lightning_calibtip.reconstruction.equalize import equalize
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.uneven import IMAGES, ROWS, convolutional, error, linear, uneven_network


@pytest.mark.parametrize("make, data", [(linear, ROWS), (convolutional, IMAGES)])
def test_channels_of_different_range_share_a_scale_fairly(make, data):
    network, calibration = uneven_network(make(), data)
    with torch.no_grad(), network.quantized(False):
        exact = network.model(data)
    before = error(network, data)
    result = equalize(network, calibration)
    assert result.kept and result.divergence_after < result.divergence_before
    assert error(network, data) < 0.3 * before
    with torch.no_grad(), network.quantized(False):
        # Nothing is different in float.
        assert torch.equal(network.model(data), exact)
    chosen = {found.name: found for found in result.inputs}
    inner = [name for name in chosen if not name.startswith("0 ")][:2]
    assert all(chosen[name].exponent > 0 and chosen[name].error_after < chosen[name].error_before for name in inner)
    notes = {line.name: line.note for line in network.summary()}
    assert all("channels of the input equalized" in notes[name.split()[0]] for name in inner)


def test_an_input_is_divided_and_its_weights_are_multiplied():
    network, calibration = uneven_network(linear(), ROWS)
    equalize(network, calibration, EqualizationOptions(exponents=[1.0]))
    layer = network.layers["2"]
    (quantizer,) = layer.input_quantizers
    ratio = quantizer.ratio.detach()
    assert ratio.max() / ratio.min() > 20
    x = torch.rand(4, 16)
    with torch.no_grad():
        integers = torch.round(x / (quantizer.scale * ratio)) + quantizer.zero_point.round()
        wanted = (integers.clamp(0, 15) - quantizer.zero_point.round()) * quantizer.scale
        assert torch.equal(quantizer(x), wanted)
        assert torch.equal(quantizer.encode(x).float(), integers.clamp(0, 15))
    assert torch.allclose(layer.latent()[0], layer.float_weight * ratio)


def test_depthwise_convolutions_pay_nothing():
    network, calibration = uneven_network(convolutional(), IMAGES, weight_bits=4)
    depthwise = network.layers["2"]
    before = depthwise.integer_weight()
    result = equalize(network, calibration)
    found = next(found for found in result.inputs if found.name == "2 input")
    assert found.exponent == 1.0
    # The ratios are in the scales of the weight's channels; where a rounding differs, it is that of the ratio.
    assert (depthwise.integer_weight() - before).abs().max() <= 1
    assert (depthwise.integer_weight() != before).float().mean() < 0.05


@pytest.mark.parametrize("options, names", [
    # ReLU6 is not homogeneous, and of a depthwise convolution behind ReLU the first layer takes the ratios in.
    ({"absorb": "only"}, {"2 input"}),
    ({"absorb": "prefer"}, {"0 input", "2 input", "4 input", "6 input"}),
    ({}, {"0 input", "2 input", "4 input", "6 input"}),
])  # fmt: skip
def test_which_inputs_may_be_equalized(options, names):
    network, calibration = uneven_network(convolutional(), IMAGES)
    result = equalize(network, calibration, EqualizationOptions(**options))
    assert {found.name for found in result.inputs} == names
    assert {found.name: found.absorbed_by for found in result.inputs}["2 input"] == "0"


def test_engines_get_what_costs_them_nothing():
    network, calibration = uneven_network(convolutional(), IMAGES, target="onnxruntime")
    assert {found.name for found in equalize(network, calibration).inputs} == {"2 input"}
    network, calibration = uneven_network(linear(nn.GELU), ROWS, target="onnxruntime")
    assert {found.name for found in equalize(network, calibration).inputs} == {"0 input", "2 input", "4 input"}
    network, calibration = uneven_network(linear(nn.GELU), ROWS, target="tensorrt", activation_bits=8)
    assert equalize(network, calibration).inputs == ()


class Shared(nn.Module):
    """Two layers and an addition read what one layer has written."""

    def __init__(self, adds: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.adds = adds
        with torch.no_grad():
            factors = torch.logspace(-1.5, 1.5, 8)
            self.first.weight.mul_(factors[:, None])
            for layer in (self.left, self.right):
                layer.weight.div_(factors)

    def forward(self, x):
        x = torch.relu(self.first(x))
        out = self.left(x) * self.right(x)
        return out + x if self.adds else out


def test_layers_that_read_one_tensor_share_its_ratios():
    network, calibration = uneven_network(Shared(False).eval(), ROWS)
    result = equalize(network, calibration)
    left, right = network.layers["left"], network.layers["right"]
    assert left.input_ratio is right.input_ratio is not None
    (found,) = [found for found in result.inputs if found.name == "left input"]
    assert found.layers == ("left", "right") and found.absorbed_by == "first"
    assert torch.allclose(right.latent()[0], right.float_weight * right.input_ratio)


def test_a_tensor_that_something_else_reads_is_not_divided_by_its_writer():
    network, calibration = uneven_network(Shared(True).eval(), ROWS)
    assert {found.absorbed_by for found in equalize(network, calibration).inputs} == {""}


def test_an_engine_is_not_asked_for_what_it_cannot_run():
    module = QuantizationModule(convolutional(), target="onnxruntime")
    with pytest.raises(ValueError, match=r"absorb='prefer' divides activations between .* give 'engine'"):
        run_stages(module, [Calibration(), Equalization(absorb="prefer")], [IMAGES])
    assert not module.network.calibrated


def test_ratios_come_back_with_checkpoints_and_packed_files(tmp_path, make_trainer):
    module = QuantizationModule(linear(), weight_bits=4, activation_bits=4, edge_bits=None)
    run_stages(module, [Calibration(), Equalization(), AdaQuant(iterations=5)], [ROWS])
    with torch.no_grad():
        wanted = module(ROWS)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "q.ckpt", weights_only=True)
    export_packed(module, tmp_path / "q.safetensors")
    for loaded in (
        QuantizationModule.load_from_checkpoint(tmp_path / "q.ckpt", model=linear()),
        load_packed(tmp_path / "q.safetensors", linear()),
    ):
        assert loaded.network.layers["2"].input_ratio is not None
        with torch.no_grad():
            assert torch.equal(loaded(ROWS), wanted)


def test_another_calibration_and_a_reset_end_it():
    network, calibration = uneven_network(linear(), ROWS)
    plain = error(network, ROWS)
    equalize(network, calibration)
    network.reset_to_float()
    assert network.layers["2"].input_ratio is None and error(network, ROWS) == pytest.approx(plain, rel=1e-6)
    equalize(network, calibration)
    network.fit_ranges()
    # The weights were multiplied and divided again, which rounds.
    assert network.layers["2"].input_ratio is None and error(network, ROWS) == pytest.approx(plain, rel=1e-3)


def test_other_bit_widths_end_it(caplog):
    network, calibration = uneven_network(linear(), ROWS, weight_bits=4)
    equalize(network, calibration)
    layer = network.layers["2"]
    layer.switch(layer.config)
    assert layer.input_ratio is None and torch.equal(layer.latent()[0], layer.float_weight)
    equalize(network, calibration)
    widths = [BitWidths(4, 4), BitWidths(8, 8)]
    adaquant_candidates(network, calibration, AdaQuantOptions("parallel", "layer", iterations=1), widths)
    assert "run Equalization after BitAllocation" in caplog.text
    assert {layer.config.bit_widths for layer in network.layers.values()} == {BitWidths(4, 4)}


def test_equalizing_a_shared_tensor_twice_keeps_what_its_layers_compute():
    network, calibration = uneven_network(Shared(False).eval(), ROWS)
    for _ in range(2):
        equalize(network, calibration)
        for name in ("left", "right"):
            layer = network.layers[name]
            assert torch.allclose(layer.latent()[0], layer.float_weight * layer.input_ratio, rtol=1e-4)


def test_a_second_run_that_is_put_back_leaves_the_first(monkeypatch):
    network, calibration = uneven_network(linear(), ROWS)
    equalize(network, calibration)
    absorbed = [planned.absorbs for planned in network.plan.modules]
    assert any(absorbed)
    monkeypatch.setattr(
        "lightning_calibtip.reconstruction.equalize.measure_divergences", lambda *args: torch.tensor([1.0])
    )
    assert not equalize(network, calibration).kept
    assert [planned.absorbs for planned in network.plan.modules] == absorbed


def test_equalizing_twice_replaces_the_ratios():
    network, calibration = uneven_network(linear(), ROWS)
    equalize(network, calibration, EqualizationOptions(exponents=[0.5]))
    half = network.layers["2"].input_ratio.detach().clone()
    equalize(network, calibration, EqualizationOptions(exponents=[1.0]))
    layer = network.layers["2"]
    assert torch.allclose(layer.input_ratio, half.square(), rtol=0.3)
    assert torch.allclose(layer.latent()[0], layer.float_weight * layer.input_ratio, rtol=1e-4)


def test_it_is_put_back_where_the_model_does_not_come_closer(monkeypatch):
    network, calibration = uneven_network(linear(), ROWS)
    with torch.no_grad():
        before = network.model(ROWS)
    monkeypatch.setattr(
        "lightning_calibtip.reconstruction.equalize.measure_divergences", lambda *args: torch.tensor([1.0])
    )
    result = equalize(network, calibration)
    assert not result.kept and all(found.exponent == 0 for found in result.inputs)
    with torch.no_grad():
        assert torch.equal(network.model(ROWS), before)


@pytest.mark.parametrize("options, message", [
    ({"absorb": "never"}, "absorb must be one of prefer, engine, only, or None, got 'never'"),
    ({"exponents": [0.5, 2.0]}, "exponents must be a list of numbers from 0 to 1"),
    ({"exponents": "0.5"}, "exponents must be a list"),
    ({"samples": 1}, "samples must be an integer of at least 2, got 1"),
])  # fmt: skip
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Equalization(**options)


def test_it_needs_a_calibrated_model():
    with pytest.raises(RuntimeError, match="run Calibration first"):
        run_stages(QuantizationModule(linear()), [Equalization()], [ROWS])
