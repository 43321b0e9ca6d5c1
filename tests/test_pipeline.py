import pytest
import torch

from lightning_calibtip import QuantizationModule, make_stages, quantize, run_stages

QUICK = {"adaquant": {"iterations": 3}, "bias_tuning": {"epochs": 1}, "compression": 0.2}


@pytest.mark.parametrize(
    "pipeline,names",
    [
        ("calibrate", ["Calibration"]),
        ("light", ["Calibration", "BitAllocation", "BatchNormTuning"]),
        ("advanced", ["Calibration", "AdaQuant", "BitAllocation", "BatchNormTuning", "BiasTuning"]),
        ("sequential", ["Calibration", "BatchNormTuning", "AdaQuant", "BiasTuning"]),
    ],
)
def test_pipelines_have_their_stages_in_order(pipeline, names, tiny_classifier, loader):
    assert [stage.name for stage in make_stages(pipeline)] == names
    run = quantize(tiny_classifier, loader, loader, pipeline, stage_options=QUICK, weight_bits=4, activation_bits=4)
    assert [name for name, _, _ in run.stages] == names
    record = run.record("test", "tiny", "val_acc", 0)
    assert record["float"] == run.float_metrics["val_acc"] and record["calibration_samples"] == 48
    assert [stage["name"] for stage in record["stages"]] == names


def test_same_seed_gives_bit_identical_models_in_two_runs(tiny_classifier, loader):
    states = []
    for _ in range(2):
        run = quantize(tiny_classifier, loader, pipeline="advanced", stage_options=QUICK, weight_bits=4)
        states.append(run.module.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_batches_may_be_a_plain_list_and_validation_left_out(tiny_classifier, images):
    run = quantize(tiny_classifier, list(images.split(16)), pipeline="calibrate", calibration_samples=20)
    assert run.calibration_samples == 32 and run.metrics == {}


def test_a_metric_that_was_not_logged_is_an_error_that_lists_what_was(tiny_classifier, loader):
    run = quantize(tiny_classifier, loader, loader, "calibrate")
    with pytest.raises(KeyError, match=r"validation logged no 'f1', only .*val_acc"):
        run.record("test", "tiny", "f1", 0)


def test_further_stages_can_run_on_the_result(tiny_classifier, loader):
    module = QuantizationModule(tiny_classifier, weight_bits=4)
    run_stages(module, make_stages("calibrate"), loader)
    before = module.network.layers["net.blocks.0.conv1"].weight.clone()
    run_stages(module, make_stages("sequential", adaquant={"iterations": 100})[2:], loader)
    assert module.network.layers["net.blocks.0.conv1"].errors is not None
    assert not torch.equal(before, module.network.layers["net.blocks.0.conv1"].weight)
