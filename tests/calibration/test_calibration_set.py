import pytest
import torch
from torch import nn

from lightning_calibtip.batches import batch_size
from lightning_calibtip.calibration.calibration_set import CalibrationSet, FirstSamples, output_logits
from lightning_calibtip.calibration.logits import kl_divergence
from lightning_calibtip.calibration.output_rms import output_rms
from tests.networks import calibrated_network, calibration_set


def keep(*batches):
    calibration = CalibrationSet(lambda batch, index: batch)
    for batch in batches:
        calibration.append(batch)
    return calibration


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batch_with_nan_or_infinity_is_refused_with_its_place(bad):
    good = {"pixels": [torch.zeros(2, 3)], "labels": torch.zeros(2, dtype=torch.int64)}
    calibration = keep(good)
    with pytest.raises(ValueError, match=r"Calibration batch 1: input\['pixels'\]\[0\] \(shape \(2, 3\)\)"):
        calibration.append({**good, "pixels": [torch.tensor([[0.0, bad, 0.0]] * 2)]})
    assert len(calibration) == 1


def test_empty_set_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match="calibration set is empty: give the Trainer a dataloader"):
        keep().require()


def test_samples_are_counted_over_batches_of_any_nesting():
    assert keep(torch.zeros(3, 2), [torch.zeros(2), torch.zeros(2)], {"a": torch.zeros(4, 1)}).samples == 9
    assert batch_size({"scalar": torch.tensor(1.0)}) == 1


def test_first_samples_stop_after_the_batch_that_completes_them():
    assert [len(batch) for batch in FirstSamples([torch.zeros(4)] * 5, 6)] == [4, 4]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FirstSamples([], 0)


def test_logits_are_found_in_tensors_tuples_and_mappings_without_the_loss():
    a, b = torch.zeros(2, 3), torch.ones(2, 4)
    assert len(output_logits(a)) == 1 and len(output_logits((a, [b]))) == 2
    assert [t.shape for t in output_logits({"loss": torch.tensor([1.0]), "start": a, "end": b})] == [a.shape, b.shape]
    with pytest.raises(TypeError, match="holds no logits to compare"):
        output_logits(None)


def test_kl_divergence_equals_torch_distributions():
    torch.manual_seed(0)
    output, target = torch.randn(6, 5), torch.randn(6, 5)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=target), torch.distributions.Categorical(logits=output)
    ).mean()
    torch.testing.assert_close(kl_divergence(output, [target]), wanted)


def test_segmentation_classes_lie_along_dimension_1():
    torch.manual_seed(0)
    output, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=target.movedim(1, -1)),
        torch.distributions.Categorical(logits=output.movedim(1, -1)),
    ).mean()
    torch.testing.assert_close(kl_divergence(output, [target]), wanted)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_single_outputs_are_compared_by_squared_error(shape):
    torch.manual_seed(0)
    output, target = torch.randn(shape), torch.randn(shape)
    wanted = (output - target).square().mean() / (2 * target.square().mean())
    torch.testing.assert_close(kl_divergence(output, [target]), wanted)


def test_output_rms_is_the_root_mean_square_by_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.randn(50, 2)
    network = calibrated_network(model, calibration_set(model, x))
    found = output_rms(network.layers.values(), lambda: model(x))
    assert found["1"] == pytest.approx(float(model(x).detach().square().mean().sqrt()), rel=1e-5)
