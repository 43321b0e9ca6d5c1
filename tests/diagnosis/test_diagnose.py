"""A diagnosis: costs against whole passes, causes that were planted, remedies that help."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn

from lightning_calibtip import Calibration, Diagnosis, QuantizationModule, quantize, run_stages
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.diagnosis.apply import apply_remedies, weight_bytes
from lightning_calibtip.diagnosis.causes import find_cause
from lightning_calibtip.diagnosis.diagnose import diagnose
from lightning_calibtip.diagnosis.layer_statistics import LayerStatistics
from lightning_calibtip.diagnosis.options import DiagnosisOptions
from lightning_calibtip.diagnosis.statistics import TensorObserver
from lightning_calibtip.network.parts import computing
from lightning_calibtip.quantization.affine_quantizer import AffineQuantizer
from lightning_calibtip.quantization.spec import TensorSpec
from lightning_calibtip.reconstruction.equalizable import equalizable_inputs

CPU = {"accelerator": "cpu"}


@pytest.fixture
def calibrated(tiny_classifier, loader):
    """A network with ranges, whose calibration set is filled."""

    def make(*stages, **scheme):
        module = QuantizationModule(tiny_classifier, **{"weight_bits": 4, "activation_bits": 4, **scheme})
        run_stages(module, [Calibration(), *stages], loader, trainer_options=CPU)
        for batch in loader:
            module.calibration.append(batch)
        return module

    return make


def test_costs_are_those_of_whole_passes_with_weights_and_inputs_put_in_by_hand(calibrated):
    module = calibrated()
    network, loss = module.network, Loss(module.network, module.calibration, "mse")
    result = diagnose(network, module.calibration, DiagnosisOptions(loss="mse", samples=48))
    assert [layer.name for layer in result.layers] == list(network.layers)
    assert result.float_loss == 0 and result.quantized_loss == pytest.approx(loss(), rel=1e-4)
    for finding in result.layers:
        layer = network.layers[finding.name]
        with network.quantized(False):
            rounded = layer.weight_quantizer.decode(layer.integer_weight())
            kept, layer.weight.data = layer.weight.data, rounded
            # Sums of floats, in another order after a replay.
            assert finding.cost.weight_alone == pytest.approx(loss(), rel=1e-3, abs=1e-7)
            layer.weight.data = kept
            hook = layer.module.register_forward_pre_hook(
                lambda _, args, q=layer.input_quantizers[0]: (q.fake_quantize(args[0]),)
            )
            assert finding.cost.inputs_alone == pytest.approx(loss(), rel=1e-3, abs=1e-7)
            hook.remove()
        layer.weight_quantizer.enabled = False
        gain = result.quantized_loss - loss()
        layer.weight_quantizer.enabled = True
        assert finding.cost.weight_left_float == pytest.approx(gain, rel=1e-3, abs=1e-6)
    # Nothing has changed.
    assert loss() == pytest.approx(result.quantized_loss, rel=1e-4)


def test_layers_of_an_equalized_network_compute_in_float_what_the_float_model_does(calibrated, images):
    module = calibrated()
    layers = []
    for tensor, readers, channels in equalizable_inputs(module.network):
        ratio = torch.rand(channels.count, generator=torch.Generator().manual_seed(0)) + 0.5
        for layer in readers:
            layer.equalize(channels, ratio)
        tensor.fit_range(layer.config.inputs[0])
        layers += readers
    assert len(layers) >= 4
    with module.quantized(False), torch.no_grad():
        wanted = module(images)
        for layer in layers:
            with computing(layer, weight=False, activations=False):
                torch.testing.assert_close(module(images), wanted, rtol=1e-4, atol=1e-4)
            with computing(layer, weight=True, activations=True):
                assert not torch.allclose(module(images), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(module(images), wanted)


def observed(values, low, high, bits=4, **axes):
    quantizer = AffineQuantizer("x", TensorSpec(bits), rows=1)
    quantizer.set_range(torch.tensor([low]), torch.tensor([high]))
    observer = TensorObserver(quantizer, **axes)
    observer.update(values)
    return observer.statistics()


def test_causes_that_were_planted_are_named():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 32, 16, generator=generator)
    one_channel = values * torch.tensor([30.0] + [1.0] * 15)
    one_token = values * torch.tensor([30.0] + [1.0] * 31).view(-1, 1)
    # Half of the values fill one step, the others the rest: of 256 levels few are used much.
    spiked = torch.where(torch.rand(values.shape, generator=generator) < 0.98, 0.01, values)
    planted = {
        "outlier channel": observed(one_channel, -90.0, 90.0, channel_axis=-1),
        "outlier token": observed(one_token, -90.0, 90.0, has_tokens=True),
        "clipped tail": observed(values, -0.5, 0.5, bits=8),
        "dead range": observed(values, -40.0, 40.0, bits=8),
        "few levels used": observed(spiked, -4.0, 4.0, bits=8),
        "coarse steps": observed(values, -3.0, 3.0, channel_axis=-1, has_tokens=True),
    }
    found = {
        name: find_cause(LayerStatistics(None, (statistics,), 0.1, 0.0), of_weight=False, has_bias=True).name
        for name, statistics in planted.items()
    }
    assert found == {name: name for name in planted}
    shifted = LayerStatistics(None, (planted["clipped tail"],), 0.1, output_bias=0.8)
    assert find_cause(shifted, of_weight=False, has_bias=True).name == "biased mean"
    assert find_cause(shifted, of_weight=False, has_bias=False).name == "clipped tail"


def test_a_run_is_diagnosed_and_its_report_shows_it(tiny_classifier, loader, tmp_path):
    run = quantize(tiny_classifier, loader, loader, "calibrate", weight_bits=4, trainer_options=CPU)
    before = run.metrics["val_loss"]
    result = run.diagnose()
    assert run.metrics["val_loss"] == before and [stage.name for stage in run.stages] == ["Calibration", "Diagnosis"]
    assert result.samples == 16 and result.worst(1)[0].cost.share == max(layer.cost.share for layer in result.layers)
    item = next(item for item in run.items if item.name == "diagnosis")
    assert {row[0] for row in item.rows} == set(run.module.network.layers)
    run.write_report(tmp_path, run.record("test", "tiny", "val_acc", 0))
    assert result.worst(1)[0].name in (tmp_path / "diagnosis.csv").read_text()
    page = (tmp_path / "diagnosis.html").read_text()
    assert "<svg" in page and "overrides=" in page and 'href="report.html"' in page
    assert 'href="diagnosis.html"' in (tmp_path / "report.html").read_text()
    again = quantize(tiny_classifier, loader, loader, "calibrate", weight_bits=4, trainer_options=CPU)
    again.write_report(tmp_path, again.record("test", "tiny", "val_acc", 0))
    assert not (tmp_path / "diagnosis.html").exists() and not (tmp_path / "diagnosis.csv").exists()


def test_remedies_are_applied_until_the_metric_is_close_enough(tiny_classifier, loader):
    # One layer has too few bits; all others have enough.
    options = {"weight_bits": 8, "activation_bits": 8, "overrides": {"net.blocks.1.conv1": (2, 8)}}
    run = quantize(tiny_classifier, loader, loader, "calibrate", trainer_options=CPU, **options)
    network = run.module.network
    size, weights = weight_bytes(network), network.layers["net.blocks.1.conv1"].weight.numel()
    lost = run.metrics["val_loss"] - run.float_metrics["val_loss"]
    assert abs(lost) > 1e-4
    # Of random weights either side may be the better one.
    mode = "min" if lost > 0 else "max"
    result = run.diagnose(apply=True, max_degradation=abs(lost) / 10, metric="val_loss", mode=mode)
    assert result.applied[0].code == "overrides={'net.blocks.1.conv1': (8, 8)}"
    assert result.applied[0].bytes == weight_bytes(network) - size == weights * 6 // 8
    assert network.layers["net.blocks.1.conv1"].config.bit_widths.weight == 8
    assert abs(run.metrics["val_loss"] - run.float_metrics["val_loss"]) <= abs(lost) / 10
    assert "within max_degradation" in result.outcome and result.applied[-1].loss < result.quantized_loss


def test_a_tolerance_that_remedies_do_not_reach_is_said_and_the_best_state_is_kept(calibrated):
    module = calibrated(weight_bits=2, activation_bits=2)
    network = module.network
    options = DiagnosisOptions(apply=True, metric="accuracy", tries=2)
    result = diagnose(network, module.calibration)
    # Of the float model, of the quantized one, and after one, two, three, ... remedies.
    values = iter([0.9, 0.5, 0.6, 0.7, *[0.4] * 99])
    found = apply_remedies(
        network, module.calibration, result, options, lambda: {"loss": 1.0, "accuracy": next(values)}
    )
    assert len(found.applied) == 2 and found.applied[-1].metric == 0.7
    assert (
        "0.2 worse" in found.outcome and "is not reached" in found.outcome and "more lowered the loss" in found.outcome
    )
    # The model is that of two remedies.
    loss = Loss(network, module.calibration, samples=found.samples)
    assert loss() == pytest.approx(found.applied[-1].loss, rel=1e-4)
    with pytest.raises(ValueError, match="'f1' is not logged by validation, only accuracy"):
        named = DiagnosisOptions(apply=True, metric="f1")
        apply_remedies(network, module.calibration, result, named, lambda: {"accuracy": 0.5})
    states = [layer.save() for layer in network.layers.values()]
    raising = iter([0.9, 0.5])
    with pytest.raises(StopIteration):
        apply_remedies(network, module.calibration, result, options, lambda: {"accuracy": next(raising)})
    for layer, state in zip(network.layers.values(), states, strict=True):
        assert layer.config == state.config and torch.equal(layer.weight, state.weight)


@pytest.mark.parametrize("enough", [1, 2, 3])
def test_the_fewest_remedies_that_are_enough_are_found_with_few_validations(enough, calibrated):
    module = calibrated(weight_bits=2, activation_bits=2)
    network, seen = module.network, []
    initial = [layer.config for layer in network.layers.values()]

    def evaluate():
        changed = sum(layer.config != config for layer, config in zip(network.layers.values(), initial, strict=True))
        seen.append(changed)
        return {"accuracy": 0.9 if changed >= enough or len(seen) == 1 else 0.5 + 0.01 * changed}

    result = diagnose(network, module.calibration)
    found = apply_remedies(network, module.calibration, result, DiagnosisOptions(apply=True), evaluate)
    widened = [remedy for remedy in found.applied if "overrides" in remedy.code]
    changed = sum(layer.config != config for layer, config in zip(network.layers.values(), initial, strict=True))
    assert changed == len(widened) == enough and found.applied[-1].metric == 0.9
    assert len(seen) <= 2 + 2 * 3, seen
    loss = Loss(network, module.calibration, samples=found.samples)
    assert loss() == pytest.approx(found.applied[-1].loss, rel=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_all_parts_quantized_are_the_quantized_layer_with_integer_biases_too(bits, calibrated, images):
    module = calibrated(target="onnxruntime", weight_bits=bits, activation_bits=bits)
    with torch.no_grad():
        wanted = module(images)
        for layer in module.network.layers.values():
            with computing(layer, weight=True, activations=True):
                assert torch.equal(module(images), wanted), layer.name


def test_what_cannot_be_done_is_refused_before_anything_runs(tiny_classifier, loader):
    module = QuantizationModule(tiny_classifier, weight_bits=4)
    with pytest.raises(MisconfigurationException, match="pass validation data"):
        Trainer(callbacks=[Calibration(), Diagnosis(apply=True)], logger=False, **CPU).fit(module, loader)
    with pytest.raises(ValueError, match="need apply=True"):
        DiagnosisOptions(metric="val_acc")
    with pytest.raises(TypeError, match="did you mean 'max_degradation'"):
        Diagnosis(max_degradations=0.1)
    run = quantize(tiny_classifier, iter(list(loader)), None, "calibrate", trainer_options=CPU)
    with pytest.raises(ValueError, match="used up"):
        run.diagnose()
    with pytest.raises(RuntimeError, match="run Calibration first"):
        diagnose(QuantizationModule(nn.Sequential(nn.Linear(2, 2))).network, run.module.calibration)
