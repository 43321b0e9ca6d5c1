from dataclasses import replace

import pytest
import torch

from lightning_calibtip import AdaQuant, Calibration, QuantizationModule
from lightning_calibtip.network.targets import Target, register_target
from lightning_calibtip.quantization.spec import BitWidths, TensorSpec
from tests.conftest import TinyClassifier
from tests.networks import logits_of


class QuantizedOutputs(Target):
    """A target on which layers write integers, too."""

    def config(self, name, layer_type, config):
        bits = next((spec.bits for spec in config.inputs if spec is not None), None)
        return config if bits is None else replace(config, output=TensorSpec(bits, one_sided=True))


register_target(QuantizedOutputs("quantized_outputs"))


@pytest.fixture
def calibrated(tiny_classifier, loader, make_trainer):
    module = QuantizationModule(tiny_classifier, weight_bits=4, activation_bits=4, target="quantized_outputs")
    make_trainer(Calibration()).fit(module, loader)
    return module


def test_outputs_are_on_the_grid_of_their_calibrated_range(calibrated, images):
    seen = {}
    for name, layer in calibrated.network.layers.items():
        layer.module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out.clone()))
    logits_of(calibrated, images)
    for name, layer in calibrated.network.layers.items():
        quantizer = layer.output_quantizer
        integers = seen[name] / quantizer.scale + quantizer.zero_point
        assert (integers - integers.round()).abs().max() < 1e-3
        assert len(seen[name].unique()) <= 2**quantizer.spec.bits


def test_outputs_are_float_while_observed_and_in_the_float_model(calibrated, images):
    with calibrated.quantized(False):
        assert len(logits_of(calibrated.model.net.stem, images).unique()) > 256
    observer = calibrated.network.layers["net.stem"].output_tensor.observer
    with calibrated.quantized(False):
        output = logits_of(calibrated.model.net.stem, images)
    # The observer's histogram holds the extremes of the float values.
    assert float(observer.row[1]) == pytest.approx(float(output.min()), rel=1e-5)
    assert float(observer.row[2]) == pytest.approx(float(output.max()), rel=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_units_are_reconstructed_through_their_outputs_and_scales_of_outputs_learn(
    calibrated, loader, make_trainer, granularity
):
    before = {name: layer.output_quantizer.scale.clone() for name, layer in calibrated.network.layers.items()}
    stage = AdaQuant(iterations=60, batch_size=16, granularity=granularity)
    make_trainer(stage).fit(calibrated, loader)
    figures = stage.result.figures
    assert figures["error_after"] < figures["error_before"]
    moved = [name for name, scale in before.items() if not torch.equal(
        calibrated.network.layers[name].output_quantizer.scale, scale)]  # fmt: skip
    assert len(moved) == figures["units"] - figures["restored"] or (granularity == "block" and moved)


def test_outputs_are_saved_and_loaded(calibrated, images, make_trainer, loader, tmp_path):
    trainer = make_trainer()
    trainer.validate(calibrated, loader, verbose=False)
    trainer.save_checkpoint(tmp_path / "outputs.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "outputs.ckpt", model=TinyClassifier())
    assert torch.equal(logits_of(loaded, images), logits_of(calibrated, images))
    assert loaded.network.layers["net.head"].output_quantizer.spec.bits == 8
    # The checkpoint holds what the target has decided, at other bit-widths too.
    for present in (BitWidths(4, 4), BitWidths(4, None)):
        loaded.network.layers["net.head"].install(loaded.network.config_for("net.head", present))
        assert loaded.network.config_for("net.head", BitWidths(4, 4)).output.bits == 4


def test_an_output_follows_its_layer_to_other_bit_widths_and_is_taken_off_with_the_activations(calibrated, images):
    layer = calibrated.network.layers["net.blocks.0.conv1"]
    calibrated.network.switch(layer.name, BitWidths(4, 8))
    assert layer.output_quantizer.spec.bits == 8 and layer.output_quantizer.enabled
    calibrated.network.switch(layer.name, BitWidths(4, None))
    assert layer.output_quantizer is None
    assert len(logits_of(layer.module, images[:, :, :4, :4].repeat(1, 6, 1, 1)).unique()) > 256
