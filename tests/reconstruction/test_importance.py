import pytest
import torch
import torch.nn.functional as F

from lightning_calibtip.calibration.recording import UnitCall
from lightning_calibtip.calibration.replay import Replay
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.importance import measure_importance
from lightning_calibtip.reconstruction.objectives import FisherError
from lightning_calibtip.reconstruction.optimize import relative_error
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.reconstruction.unit_data import UnitDataset
from lightning_calibtip.reconstruction.units import find_units
from tests.networks import calibrated_network, calibration_set, recorded


@pytest.fixture
def calibrated(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    return calibrated_network(tiny_resnet, calibration, weight_bits=2), calibration


def loss(output, batch):
    return F.cross_entropy(output, torch.arange(len(batch)) % 4, reduction="sum")


def test_importance_is_the_squared_gradient_of_the_float_models_loss(calibrated):
    network, calibration = calibrated
    units = find_units(network, "block")
    stream = Replay(network.model, network.structure, calibration, [unit.name for unit in units])
    found = measure_importance(network, calibration, units, stream, loss)
    assert all(parameter.grad is None for parameter in network.model.parameters())
    with network.quantized(False):
        # Gradients by autograd alone: the block's output is kept as an intermediate value of a graph from the input.
        kept = []

        def keep(module, args, output):
            output.retain_grad()
            kept.append(output)

        handle = network.model.blocks[0].register_forward_hook(keep)
        batch = calibration.batches[1].clone().requires_grad_()
        loss(network.model(batch), batch).backward()
        handle.remove()
    assert list(found) == ["stem", "blocks.0", "blocks.1", "head"]
    (weights,) = found["blocks.0"][1]
    squares = kept[0].grad.square()
    torch.testing.assert_close(weights, 0.5 + 0.5 * squares / squares.mean(), rtol=1e-4, atol=1e-5)


def test_errors_count_by_their_importance(calibrated):
    network, _ = calibrated
    unit = find_units(network, "layer")[-1]
    x = torch.randn(4, 6)
    with torch.no_grad():
        target = unit.module(x) + torch.tensor([1.0, 0.0, 0.0, 2.0])
    weights = torch.tensor([2.5, 0.5, 0.5, 0.5])
    dataset = UnitDataset(recorded(UnitCall((x,), {})), recorded(target), importance=recorded([weights.expand(4, 4)]))
    wanted = float((weights * torch.tensor([1.0, 0.0, 0.0, 4.0])).sum() * 4 / (target.square() * weights).sum())
    assert relative_error(unit, [FisherError()], dataset, torch.arange(4)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_reconstruction_with_a_loss_differs_and_lowers_errors(calibrated, tiny_resnet, mode):
    network, calibration = calibrated
    options = AdaQuantOptions(mode, loss=loss, iterations=150, batch_size=16, weight_rate=3e-2)
    results = adaquant(network, calibration, options)
    assert sum(result.error_after for result in results) < 0.9 * sum(result.error_before for result in results)


@pytest.mark.parametrize(
    "bad,message",
    [
        (
            lambda output, batch: output,
            r"must return a scalar tensor that depends on the model's output, got shape \(16, 4\)",
        ),
        (lambda output, batch: 1.0, "got float"),
        (lambda output, batch: output.sum() * float("nan"), "is nan for calibration batch 0"),
    ],
)
def test_a_loss_that_is_none_is_refused(calibrated, bad, message):
    with pytest.raises(ValueError, match=message):
        adaquant(*calibrated, AdaQuantOptions(iterations=1, loss=bad))
