"""Utilities against arithmetic done by hand or in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip import Utility
from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.calibration.losses import Loss
from tests.networks import calibrated_network, calibration_set

MATRIX = [[0, 1, 2], [5, 0, 1], [9, 5, 0]]


def decisions_in_plain_python(probabilities):
    found = []
    for row in probabilities.tolist():
        costs = [sum(p * cost for p, cost in zip(row, of_decision, strict=True)) for of_decision in MATRIX]
        found.append((costs.index(min(costs)), costs))
    return found


def test_decisions_are_those_of_least_expected_cost(generator):
    probabilities = torch.randn(200, 3, generator=generator).softmax(1)
    utility = Utility(MATRIX)
    wanted = decisions_in_plain_python(probabilities)
    torch.testing.assert_close(utility.expected_costs(probabilities), torch.tensor([costs for _, costs in wanted]))
    assert utility.decide(probabilities).tolist() == [decision for decision, _ in wanted]
    # The dear row is taken less often than the most probable class would be.
    assert (utility.decide(probabilities) == 2).sum() < (probabilities.argmax(1) == 2).sum()


def test_a_function_of_two_classes_is_the_same_as_its_matrix():
    utility = Utility(cost=lambda decision, truth: MATRIX[decision][truth], classes=3)
    assert utility == Utility(MATRIX) == Utility(torch.tensor(MATRIX)) and utility.name == Utility(MATRIX).name
    assert utility.name != Utility(MATRIX, temperature=0.1).name != Utility([[0, 1], [1, 0]]).name


@pytest.mark.parametrize(
    "options,message",
    [
        ({"matrix": [[0, 1, 2], [1, 0, 1]]}, r"must be square.*2 rows \(rows of 3 costs\)"),
        ({"matrix": [[0, 1], [1]]}, "must be square"),
        ({"matrix": [[0]]}, "two or more classes"),
        ({"matrix": []}, "no rows"),
        ({"matrix": [[0, 1], [-2, 0]]}, r"matrix\[1\]\[0\] is -2.0; costs must be finite"),
        ({"matrix": [[0, math.nan], [2, 0]]}, r"matrix\[0\]\[1\] is nan"),
        ({"matrix": [[0, math.inf], [2, 0]]}, r"matrix\[0\]\[1\] is inf"),
        ({"matrix": torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])}, r"matrix\[1\]\[0\] is nan"),
        ({"matrix": [[3, 3], [3, 3]]}, "rows of the matrix are alike"),
        ({"matrix": "costs"}, "must be a list of rows of numbers, got 'costs'"),
        ({}, "give either matrix or cost"),
        ({"matrix": MATRIX, "cost": max}, "give either matrix or cost"),
        ({"cost": max}, "cost needs classes"),
        ({"matrix": MATRIX, "classes": 4}, "3 rows, and classes is 4"),
        ({"cost": lambda h, c: -1.0, "classes": 2}, r"matrix\[0\]\[0\] is -1.0"),
        ({"matrix": MATRIX, "temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"matrix": MATRIX, "dropout_samples": -1}, "dropout_samples must be an integer of at least 0"),
        ({"matrix": MATRIX, "ensemble": ["model.ckpt"]}, "ensemble must hold modules, got a str"),
    ],
)
def test_what_is_no_utility_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Utility(**options)


def test_the_measured_loss_is_the_expected_cost_by_the_float_probabilities(generator):
    """At a temperature near 0 a soft decision is the decision itself."""
    logits, wanted = torch.randn(2, 100, 3, generator=generator)
    utility = Utility(MATRIX, temperature=1e-6)
    found = utility.of_samples(logits, [wanted])
    ours = decisions_in_plain_python(logits.softmax(1))
    theirs = decisions_in_plain_python(wanted.softmax(1))
    hand = [costs[decision] for (decision, _), (_, costs) in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(found, torch.tensor(hand), rtol=1e-4, atol=1e-4)
    # No decision is expected to cost less than the float model's own.
    assert (found >= utility.of_samples(wanted, [wanted]) - 1e-4).all()


def test_the_divergence_of_two_classes_is_that_of_probabilities_moved_to_where_the_decision_turns():
    """With costs 1 and 20 the decision turns at a logit of log 20; there the chances of both are even."""
    logits, wanted = torch.tensor([3.2, -1.0, 2.0]), torch.tensor([2.8, 0.5, 2.0])
    divergence = Utility([[0, 1], [20, 0]]).predictor()
    found = divergence.of_samples(logits, [wanted])
    p, q = wanted.sigmoid(), logits.sigmoid()
    r, s = (wanted - math.log(20)).sigmoid(), (logits - math.log(20)).sigmoid()

    def kl(a, b):
        return a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()

    # Of the costs p and 20 (1 - p), the harmonic mean; 5.25 is the matrix' mean.
    stake = 2 * p * 20 * (1 - p) / (p + 20 * (1 - p)) / 5.25
    torch.testing.assert_close(found, stake * kl(r, s) + 0.1 * kl(p, q), rtol=1e-3, atol=1e-6)
    assert found[2] == 0


def test_the_divergence_of_decisions_hardly_sees_what_makes_no_difference_to_them(generator):
    """Two classes that cost alike, whatever is taken for the other, against one whose mistakes are dear."""
    matrix = [[0, 0.01, 10], [0.01, 0, 10], [10, 10, 0]]
    wanted = torch.zeros(1, 3)
    between, across = torch.tensor([[0.5, -0.5, 0.0]]), torch.tensor([[0.25, 0.25, -0.5]])
    kl = [
        F.kl_div(each.log_softmax(1), wanted.log_softmax(1), reduction="sum", log_target=True).item()
        for each in (between, across)
    ]
    lost = [Utility(matrix).predictor().of_samples(each, [wanted]).item() for each in (between, across)]
    assert lost[0] / kl[0] < 0.5 * lost[1] / kl[1]


def test_the_training_loss_is_kl_and_the_logarithm_of_what_is_left_to_the_largest_cost(generator):
    logits, wanted = torch.randn(2, 50, 3, generator=generator)
    utility = Utility(MATRIX, temperature=0.1)
    kl = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none").sum(1)
    weight = -(1.01 * 9 - utility.of_samples(logits, [wanted])).log()
    torch.testing.assert_close(utility.training_loss(logits, [wanted]), kl + weight, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_training_loss_lower_the_expected_cost(generator):
    wanted = torch.randn(64, 3, generator=generator) * 2
    logits = (wanted + torch.randn(64, 3, generator=generator)).requires_grad_()
    utility, before = Utility(MATRIX, temperature=0.1), None
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = utility.training_loss(logits, [wanted]).mean()
        before = utility.of_samples(logits, [wanted]).mean().item() if before is None else before
        loss.backward()
        optimizer.step()
    least = utility.of_samples(wanted, [wanted]).mean().item()
    assert utility.of_samples(logits.detach(), [wanted]).mean().item() - least < 0.2 * (before - least)


def test_the_probe_s_squared_gradient_is_the_fisher_matrix_and_that_of_the_cost(generator):
    """Over many draws: the diagonal of ``E[g g']`` of cross entropy is ``p (1 - p)``, and the gradient of the cost's
    part is constant."""
    wanted = torch.tensor([[0.5, -0.2, 0.1]])
    p = wanted.softmax(1)
    decision = Utility(MATRIX).decide(p)
    cost = torch.tensor(MATRIX, dtype=torch.float32)[decision]
    logits = wanted.clone().requires_grad_()
    of_cost = -(1.01 * 9 - (logits.softmax(1) * cost).sum()).log()
    (constant,) = torch.autograd.grad(of_cost, logits)
    draws, squares = 4000, torch.zeros(1, 3)
    for _ in range(draws):
        logits = wanted.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(Utility(MATRIX).probe(logits, [wanted], None, generator), logits)
        squares += gradient.square() / draws
    # The mean of cross entropy's gradient is 0, so that the two do not mix.
    torch.testing.assert_close(squares, p * (1 - p) + constant.square(), rtol=0.08, atol=0.0)


def test_a_single_logit_is_that_of_the_second_of_two_classes(generator):
    single = torch.randn(20, 1, generator=generator)
    utility = Utility([[0, 1], [10, 0]])
    both = torch.cat([torch.zeros_like(single), single], 1)
    torch.testing.assert_close(utility.probabilities(single), both.softmax(1))
    other = torch.randn(20, 1, generator=generator)
    pair = torch.cat([torch.zeros_like(other), other], 1)
    torch.testing.assert_close(utility.of_samples(other, [single]), utility.of_samples(pair, [both]))


def test_positions_are_averaged_and_padding_is_left_out(generator):
    logits, wanted = torch.randn(2, 2, 4, 3, generator=generator)
    tokens = torch.tensor([[True, True, False, False], [True, True, True, True]])
    utility = Utility(MATRIX)
    found = utility.of_samples(logits, [wanted], tokens)
    flat = utility.of_samples(logits.flatten(0, 1), [wanted.flatten(0, 1)]).view(2, 4)
    torch.testing.assert_close(found, torch.stack([flat[0, :2].mean(), flat[1].mean()]))
    images, targets = (each.permute(0, 2, 1).unsqueeze(-1) for each in (logits, wanted))
    torch.testing.assert_close(utility.of_samples(images, [targets]), flat.mean(1))


def test_a_matrix_of_another_number_of_classes_is_refused(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, *images.split(16))
    network = calibrated_network(tiny_resnet, calibration)
    with pytest.raises(ValueError, match=r"the matrix has 3 classes, and the model gives an output of shape \(16, 4\)"):
        Loss(network, calibration, Utility(MATRIX))()


class Doubtful(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(6, 32), nn.Dropout(p), nn.Linear(32, 3)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.first(x))))


def calibrated(model, batches):
    calibration = CalibrationSet(lambda batch, index: model(batch))
    for batch in batches:
        calibration.append(batch)
    return calibrated_network(model.eval(), calibration), calibration


def test_dropout_s_probabilities_are_the_mean_of_passes_with_dropout_alone_active(generator):
    batches = list(torch.randn(32, 6, generator=generator).split(16))
    network, calibration = calibrated(Doubtful(), batches)
    state, modes = torch.get_rng_state(), [module.training for module in network.model.modules()]
    targets = Utility(MATRIX, dropout_samples=8, seed=3).targets(network, calibration)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.model.modules()] == modes and not network.model.drop.training
    again = Utility(MATRIX, dropout_samples=8, seed=3).targets(network, calibration)
    other = Utility(MATRIX, dropout_samples=8, seed=4).targets(network, calibration)
    assert torch.equal(targets[0][0], again[0][0]) and not torch.equal(targets[0][0], other[0][0])
    model = Doubtful().eval()
    model.drop.train()
    torch.manual_seed(3)
    with torch.no_grad():
        passes = [[model(batch).softmax(1) for batch in batches] for _ in range(8)]
    wanted = torch.stack([each[1] for each in passes]).mean(0)
    torch.testing.assert_close(targets[1][0].softmax(1), wanted, rtol=1e-4, atol=1e-6)
    without, own_set = calibrated(Doubtful(p=0.0), batches)
    with pytest.raises(ValueError, match="dropout_samples=8 needs dropout layers"):
        Utility(MATRIX, dropout_samples=8).targets(without, own_set)


def test_an_ensemble_s_probabilities_are_the_mean_of_its_members_and_the_model(generator):
    batches = list(torch.randn(32, 6, generator=generator).split(16))
    network, calibration = calibrated(Doubtful(), batches)
    member = nn.Sequential(nn.Linear(6, 3)).train()
    (first, _) = Utility(MATRIX, ensemble=[member]).targets(network, calibration)
    assert member.training
    with torch.no_grad():
        wanted = (Doubtful().eval()(batches[0]).softmax(1) + member(batches[0]).softmax(1)) / 2
    torch.testing.assert_close(first[0].softmax(1), wanted, rtol=1e-4, atol=1e-6)
    names = {Utility(MATRIX, ensemble=[each]).name for each in (member, nn.Linear(6, 3))} | {Utility(MATRIX).name}
    assert len(names) == 3
    with pytest.raises(ValueError, match="outputs of different shapes"):
        Utility(MATRIX, ensemble=[nn.Linear(6, 4)]).targets(network, calibration)


@pytest.mark.parametrize("logits, wanted", [([[30.0]], [[-30.0]]), ([[0.0, 95.0]], [[10.0, 0.0]])])
def test_confident_mistakes_have_the_gradient_of_the_kl_divergence(logits, wanted):
    logits, wanted = torch.tensor(logits, requires_grad=True), torch.tensor(wanted)
    utility = Utility([[0, 1], [1, 0]])
    utility.training_loss(logits, [wanted]).sum().backward()
    assert float(logits.grad.abs().sum()) > 0.5
    # What a model rules out altogether is no NaN.
    masked = torch.tensor([[0.0, -math.inf]])
    assert bool(torch.isfinite(utility.training_loss(masked, [masked])).all())


def test_one_logit_stands_for_two_classes_in_images_and_sequences_too(generator):
    utility = Utility([[0, 1], [10, 0]])
    for shape, wanted in (((4, 1, 5, 5), (4, 5, 5, 2)), ((4, 6, 1), (4, 6, 2)), ((4,), (4, 2))):
        logits = torch.randn(shape, generator=generator)
        assert utility.probabilities(logits).shape == wanted
        torch.testing.assert_close(utility.probabilities(logits)[..., 1].flatten(), logits.sigmoid().flatten())
        utility.check_logits([("", logits)])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"matrix": [[0, 1e39], [2, 0]]}, r"matrix\[0\]\[1\] is 1e\+39; costs must be finite"),
        ({"matrix": [[0, 1e-46], [2e-46, 0]]}, "all rows of the matrix are alike"),
        ({"matrix": [[0, 1], [2, 0]], "ensemble": nn.Sequential(nn.Linear(2, 2))}, r"got one model: give \[model\]"),
        ({"matrix": [[0, 1], [2, 0]], "temperature": "low"}, "temperature must be a finite number above 0, got 'low'"),
        ({"cost": "package.function", "classes": 2}, "cost must be a function"),
    ],
)
def test_what_no_cost_can_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Utility(**options)
