"""Objectives and rounding methods of one's own, registered outside the package."""

import copy
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch

from lightning_calibtip.quantization.affine_quantizer import AffineQuantizer
from lightning_calibtip.quantization.quantizers import register_quantizer
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.objectives import Objective, register_objective
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.reconstruction.rounding import Rounding, WeightTrainable, register_rounding
from tests.networks import calibrated_network, calibration_set


@register_objective("test_logcosh")
class LogCosh(Objective):
    def loss(self, output, target, weight):
        difference = (output - target).abs()
        losses = difference + torch.nn.functional.softplus(-2 * difference) - torch.log(torch.tensor(2.0))
        return (losses if weight is None else losses * weight).sum()

    def power(self, target, weight):
        return self.loss(torch.zeros_like(target), target, weight)


@register_objective("test_bounded_bias")
class BoundedBias(LogCosh):
    seen: ClassVar[list[float]] = []

    def penalty(self, progress):
        self.seen.append(progress)
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        return 0.1 * sum(bias.square().sum() for bias in biases) if progress > 0.1 else None


@register_rounding("test_offset")
class Offset(Rounding):
    """Learns one offset for each output channel, which is added to the weights before they are rounded."""

    def __init__(self, layer):
        super().__init__(layer)
        self.offset = torch.zeros(layer.weight.shape[0], *[1] * (layer.weight.dim() - 1))

    def trainables(self):
        return [WeightTrainable(self.offset, self.layer.weight_quantizer.step_size(), "weight")]

    @contextmanager
    def acting(self):
        hook = self.layer.weight_quantizer.register_forward_pre_hook(lambda module, args: args[0] + self.offset)
        try:
            yield
        finally:
            hook.remove()
            self.layer.weight.data += self.offset.detach()


def reconstructed(tiny_resnet, images, options, **scheme):
    model = copy.deepcopy(tiny_resnet)
    calibration = calibration_set(model, *images.split(16))
    network = calibrated_network(model, calibration, **{"weight_bits": 2, "activation_bits": 4, **scheme})
    return network, adaquant(network, calibration, options)


def lowers_errors(results):
    before, after = (sum(getattr(result, name) for result in results) for name in ("error_before", "error_after"))
    return after < 0.95 * before and any(result.kept for result in results)


def test_an_objective_of_ones_own_is_minimised_and_measured(tiny_resnet, images):
    options = AdaQuantOptions(objective="test_logcosh", iterations=100, batch_size=16)
    _, results = reconstructed(tiny_resnet, images, options)
    assert lowers_errors(results)
    _, squared = reconstructed(tiny_resnet, images, AdaQuantOptions(iterations=1))
    assert results[0].error_before != squared[0].error_before


def test_a_penalty_of_ones_own_acts(tiny_resnet, images):
    biases = []
    for objective in ("test_logcosh", "test_bounded_bias"):
        options = AdaQuantOptions(
            "parallel", "layer", objective=objective, iterations=100, batch_size=16, bias_rate=0.02, relative=False
        )
        network, results = reconstructed(tiny_resnet, images, options)
        biases.append([layer.bias for layer in network.layers.values()])
    assert BoundedBias.seen == [step / 100 for step in range(100)] * len(results)
    assert not all(map(torch.equal, *biases))


def test_an_objective_of_ones_own_gets_the_weights_of_a_loss(tiny_resnet, images):
    def first_logit(output, batch):
        return output[:, 0].square().sum()

    options = AdaQuantOptions(objective="test_logcosh", iterations=1)
    _, plain = reconstructed(tiny_resnet, images, options)
    _, weighted = reconstructed(
        tiny_resnet, images, AdaQuantOptions(objective="test_logcosh", loss=first_logit, iterations=1)
    )
    assert [r.error_before for r in plain] != [r.error_before for r in weighted]


def test_a_loss_turns_the_squared_error_into_the_fisher_weighted_one():
    assert AdaQuantOptions(loss=torch.nn.functional.mse_loss).objective_in_use == "fisher"
    assert AdaQuantOptions().objective_in_use == "squared_error"


def test_a_rounding_of_ones_own_is_learned(tiny_resnet, images):
    options = AdaQuantOptions("parallel", "layer", rounding="test_offset", iterations=100, batch_size=16)
    network, results = reconstructed(tiny_resnet, images, options)
    assert lowers_errors(results)
    layer = next(network.layers[result.name] for result in results if result.kept)
    moved = (layer.weight - layer.float_weight).flatten(1)
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), atol=1e-5, rtol=0)


@register_quantizer("test_not_affine")
class NotAffine(AffineQuantizer):
    """A kind that only passes itself off as another one, see the test."""


def test_learned_rounding_refuses_a_weight_that_is_not_affine_before_it_starts(tiny_resnet, images, monkeypatch):
    monkeypatch.setattr("lightning_calibtip.reconstruction.learned_rounding.AffineQuantizer", type("Other", (), {}))
    message = r'stem: rounding="learned" needs an affine quantizer of the weight, got NotAffine; use rounding="straight'
    with pytest.raises(ValueError, match=message):
        reconstructed(
            tiny_resnet, images, AdaQuantOptions(rounding="learned", iterations=1), weight_quantizer="test_not_affine"
        )
