import pytest
import torch

from lightning_calibtip.network.trial import trial
from tests.networks import calibrated_network, calibration_set


@pytest.fixture
def layers(tiny_resnet, images):
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images))
    return list(network.layers.values())


def states(layers):
    return [
        torch.cat([t.flatten() for t in (s.weight, s.bias, *s.qparams)]) for s in (layer.save() for layer in layers)
    ]


def change(layers):
    with torch.no_grad():
        for layer in layers:
            layer.weight.add_(0.1)
            layer.bias.mul_(2)
            layer.quantizers[1].scale.mul_(3)


def is_unchanged(layers, before):
    return all(torch.equal(now, then) for now, then in zip(states(layers), before, strict=True))


def test_what_the_judge_finds_better_is_kept(layers):
    losses, before = iter([torch.tensor([1.0, 3.0]), torch.tensor([1.5, 2.0])]), states(layers)
    with trial(layers, lambda: next(losses)) as attempt:
        change(layers)
    assert attempt.kept and attempt.note == "" and not is_unchanged(layers, before)
    assert torch.equal(attempt.after, torch.tensor([1.5, 2.0])) and torch.equal(
        attempt.before, torch.tensor([1.0, 3.0])
    )


@pytest.mark.parametrize("after", [2.0, 2.5, float("nan")])
def test_what_the_judge_does_not_find_better_is_put_back(layers, after):
    losses, before = iter([2.0, after]), states(layers)
    with trial(layers, lambda: next(losses)) as attempt:
        change(layers)
    assert not attempt.kept and "did not fall" in attempt.note and is_unchanged(layers, before)
    assert float(attempt.after) == 2.0 and (float(attempt.tried) == after or after != after)


def test_an_attempt_that_fails_is_put_back_without_being_judged(layers):
    asked, before = [], states(layers)
    with trial(layers, lambda: asked.append(None) or 1.0) as attempt:
        change(layers)
        attempt.fail("it diverged")
    assert (attempt.kept, attempt.note, len(asked)) == (False, "it diverged", 1) and is_unchanged(layers, before)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_puts_everything_back_and_goes_on(layers, error):
    before = states(layers)
    with pytest.raises(error), trial(layers):
        change(layers)
        raise error
    assert is_unchanged(layers, before)


def test_without_a_judge_whatever_ends_is_kept(layers):
    before = states(layers)
    with trial(layers) as attempt:
        change(layers)
    assert attempt.kept and not is_unchanged(layers, before)


def test_the_rule_may_be_stricter_than_the_mean(layers):
    losses, before = iter([2.0, 1.9]), states(layers)
    with trial(layers, lambda: next(losses), lambda old, new: bool(new < old - 0.5)) as attempt:
        change(layers)
    assert not attempt.kept and is_unchanged(layers, before)


def test_a_switched_format_is_put_back_too(layers):
    before, config = states(layers), layers[1].config
    with pytest.raises(KeyError), trial(layers):
        layers[1].switch(layers[0].config)
        raise KeyError
    assert layers[1].config == config and is_unchanged(layers, before)
