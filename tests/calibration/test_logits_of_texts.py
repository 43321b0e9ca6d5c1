"""Logits of long texts over large vocabularies are compared at some of their positions."""

import torch

from lightning_calibtip.calibration import logits as logits_file
from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.calibration.logits import float_logits, sample_divergences
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.network.network import QuantizedNetwork
from lightning_calibtip.network.scheme import QuantizationScheme


def _text_network(positions=12, vocabulary=5):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, vocabulary)).eval()
    batch = {"x": torch.randn(2, positions, 3), "attention_mask": torch.ones(2, positions)}
    batch["attention_mask"][1, 4:] = 0
    calibration = CalibrationSet(lambda given, index: {"logits": model(given["x"])})
    calibration.append(batch)
    return QuantizedNetwork(model, QuantizationScheme()), calibration


def test_only_positions_that_count_are_kept_at_even_distances(monkeypatch):
    network, calibration = _text_network()
    monkeypatch.setattr(logits_file, "_MOST_LOGITS", 20)
    whole = network.model(calibration.batches[0]["x"])
    ((kept,),) = float_logits(network, calibration)
    assert kept.shape == (2, 4, 5)
    torch.testing.assert_close(kept[0], whole[0, [0, 4, 7, 11]])
    torch.testing.assert_close(kept[1], whole[1, [0, 1, 2, 3]])


def test_losses_of_the_positions_that_are_kept(monkeypatch):
    network, calibration = _text_network()
    monkeypatch.setattr(logits_file, "_MOST_LOGITS", 20)
    batch = calibration.batches[0]
    tokens, whole = calibration.tokens(0), network.model(batch["x"])
    (targets,) = float_logits(network, calibration)
    shifted = {"logits": whole + torch.randn(whole.shape)}
    found = sample_divergences(shifted, targets, tokens)
    index = torch.tensor([[0, 4, 7, 11], [0, 1, 2, 3]])
    rows = torch.arange(2)[:, None]
    wanted = sample_divergences(shifted["logits"][rows, index], [whole[rows, index]])
    torch.testing.assert_close(found, wanted)
    assert Loss(network, calibration, "mse")() == 0.0
    assert Loss(network, calibration, "mse")(lambda index: shifted) > 0.1
    # Whole targets are compared as a whole.
    assert not torch.allclose(sample_divergences(shifted, [whole.detach()], tokens), found)


def test_a_mask_of_other_positions_than_the_logits_is_left_out(monkeypatch):
    """As of a decoder's logits beside the mask of the encoder's tokens."""
    monkeypatch.setattr(logits_file, "_MOST_LOGITS", 20)
    network, calibration = _text_network()
    (targets,) = float_logits(network, calibration)
    whole = network.model(calibration.batches[0]["x"])
    shifted = whole + torch.randn(whole.shape)
    for positions in (4, 30):
        mask = torch.zeros(2, positions, dtype=torch.bool)
        mask[:, :2] = True
        found = sample_divergences(shifted, targets, mask)
        assert found.shape == (2,) and (found > 0.01).all()
