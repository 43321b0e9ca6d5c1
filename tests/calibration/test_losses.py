from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.calibration.divergences import divergence_of
from lightning_calibtip.calibration.losses import Loss
from tests.networks import calibrated_network, calibration_set


@pytest.fixture
def quantized(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(13))
    return calibrated_network(tiny_resnet, calibration), calibration


def outputs(network, images):
    """Quantized and float outputs, in the batches of the calibration set: another batch size may round otherwise."""

    def run():
        return torch.cat([network.model(batch) for batch in images.split(13)])

    with torch.no_grad():
        quantized = run()
        with network.quantized(False):
            return quantized, run()


def test_kl_is_the_mean_divergence_over_samples(tiny_resnet, images):
    """A divergence is a sum of differences of logarithms, each rounded to float32: its error is a few epsilons, however
    small it is itself. With two bits it is far greater than that."""
    calibration = calibration_set(tiny_resnet, *images.split(13))
    network = calibrated_network(tiny_resnet, calibration, weight_bits=2, activation_bits=2, edge_bits=None)
    output, target = (logits.double() for logits in outputs(network, images))
    wanted = F.kl_div(output.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")
    rounding = 8 * torch.finfo(torch.float32).eps
    assert Loss(network, calibration)() == pytest.approx(float(wanted), rel=0, abs=rounding)
    assert float(wanted) > 100 * rounding
    with network.quantized(False):
        assert Loss(network, calibration)() == 0


def test_mse_is_relative_to_the_float_output(quantized, images):
    network, calibration = quantized
    first = images[:13]
    output, target = outputs(network, first)
    wanted = float((output - target).square().mean() / target.square().mean())
    assert Loss(network, calibration, "mse", samples=10)() == pytest.approx(wanted, rel=1e-4)


def test_a_function_of_the_user_s_is_averaged_over_samples(tiny_resnet, images):
    labels = torch.arange(len(images)) % 4
    calibration = CalibrationSet(lambda batch, index: tiny_resnet(batch[0]))
    for batch in zip(images.split(13), labels.split(13), strict=True):
        calibration.append(batch)
    network = calibrated_network(tiny_resnet, calibration)

    def labelled(output, batch):
        return F.cross_entropy(output, batch[1])

    loss = Loss(network, calibration, labelled)
    wanted = F.cross_entropy(outputs(network, images)[0], labels)
    assert loss() == pytest.approx(float(wanted), rel=1e-4)
    assert "labelled#" in loss.name
    whole = Loss(network, calibration, lambda output, batch: F.cross_entropy(output, batch[1], reduction="none"))
    assert whole() == pytest.approx(float(wanted), rel=1e-4)


def test_metrics_are_told_apart_by_their_code_and_not_by_their_address(quantized):
    one, other = (Loss(*quantized, metric=m).name for m in (lambda o, b: o.sum(), lambda o, b: o.mean()))
    assert one != other
    metrics = [partial(F.mse_loss, reduction="mean") for _ in range(2)]
    assert len({Loss(*quantized, metric=metric).name for metric in metrics}) == 1


def test_samples_are_whole_batches(quantized):
    network, calibration = quantized
    assert Loss(network, calibration, samples=14).calibration.samples == 26
    assert Loss(network, calibration, samples=13).calibration.samples == 13
    assert Loss(network, calibration).calibration.samples == calibration.samples


def test_an_unknown_metric_is_named(quantized):
    with pytest.raises(ValueError, match=r"metric must be kl, mse.* a Utility or a function metric.*, got 'top1'"):
        Loss(*quantized, metric="top1")


def test_padding_that_is_not_finite_does_not_count_for_squared_errors():
    wanted, tokens = torch.ones(1, 3, 2), torch.tensor([[True, True, False]])
    output = 1.5 * wanted
    wanted[0, 2], output[0, 2] = torch.nan, torch.inf
    assert float(divergence_of("mse").of_samples(output, [wanted], tokens)) == pytest.approx(0.25)
    # The difference of numbers of 16 bits may be beyond these.
    large = torch.tensor([[60000.0]], dtype=torch.float16)
    assert float(divergence_of("mse").of_samples(-large, [large])) == pytest.approx(4.0)
