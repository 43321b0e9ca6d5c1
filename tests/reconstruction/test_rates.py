from itertools import chain, repeat

import torch
from torch import nn

from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.networks import calibrated_network, calibration_set


def test_fewer_steps_are_longer(monkeypatch):
    moves = []
    for steps in (1, 100):
        monkeypatch.setattr("lightning_calibtip.reconstruction.options._REFERENCE_STEPS", steps)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3)).eval()
        calibration = calibration_set(model, torch.randn(16, 4))
        network = calibrated_network(model, calibration, weight_bits=2, activation_bits=4, edge_bits=None)
        (layer,) = network.layers.values()
        before = layer.bias.clone()
        # Adam's first step is as long as the rate, whatever the gradient; what comes of it is kept in any case.
        errors = chain([0.5], repeat(0.4))
        monkeypatch.setattr(
            "lightning_calibtip.reconstruction.optimize.relative_error", lambda *args, errors=errors: next(errors)
        )
        adaquant(network, calibration, AdaQuantOptions(granularity="layer", iterations=1))
        moves.append((layer.bias - before).abs())
    assert (moves[0] > 0).all()
    torch.testing.assert_close(moves[1], 10 * moves[0], rtol=1e-3, atol=0)


def test_the_share_of_the_way_that_generalises_is_kept(tiny_resnet, images, monkeypatch):
    """The optimiser's steps are replaced by one that goes far beyond the best place."""
    calibration = calibration_set(tiny_resnet, *images.split(16))
    network = calibrated_network(tiny_resnet, calibration, weight_bits=2, activation_bits=4)
    before = {name: layer.save() for name, layer in network.layers.items()}

    def too_far(self, training, error_before):
        for layer in self.unit.layers:
            layer.bias.data.add_(1.0)
        return ""

    def distance(unit, *args):
        return sum(float((layer.bias - before[layer.name].bias - 0.5).square().mean()) for layer in unit.layers)

    monkeypatch.setattr("lightning_calibtip.reconstruction.optimize._Descent.run", too_far)
    monkeypatch.setattr("lightning_calibtip.reconstruction.optimize.relative_error", distance)
    results = adaquant(network, calibration, AdaQuantOptions(batch_size=16))
    for name, layer in network.layers.items():
        torch.testing.assert_close(layer.bias, before[name].bias + 0.5)
        assert torch.equal(layer.weight, before[name].weight)
    assert all(result.kept and result.error_after < 1e-10 for result in results)
