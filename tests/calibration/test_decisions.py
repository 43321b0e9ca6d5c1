import torch
from torch import nn

from lightning_calibtip import Utility
from lightning_calibtip.calibration.decisions import Tally, expected_decisions
from tests.networks import calibrated_network, calibration_set

MATRIX = [[0, 1, 2], [5, 0, 1], [9, 5, 0]]


def by_hand(logits, labels):
    costs, confusion = [], torch.zeros(3, 3, dtype=torch.float64)
    for row, truth in zip(logits.softmax(1).tolist(), labels.tolist(), strict=True):
        if truth < 0:
            continue
        expected = [sum(p * c for p, c in zip(row, of, strict=True)) for of in MATRIX]
        decision = expected.index(min(expected))
        confusion[decision, truth] += 1
        costs.append(float(MATRIX[decision][truth]))
    return torch.tensor(costs, dtype=torch.float64), confusion / len(costs)


def test_realised_costs_and_confusion_are_those_counted_by_hand(generator):
    one, other = torch.randn(2, 60, 3, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    labels[::7] = -100
    tally = Tally(Utility(MATRIX))
    for part in range(0, 60, 20):
        tally.add(one[part : part + 20], other[part : part + 20], labels[part : part + 20])
    found = tally.decisions("labels")
    costs = [by_hand(logits, labels) for logits in (one, other)]
    known = labels >= 0
    assert found.samples == int(known.sum())
    for model, logits in enumerate((one, other)):
        torch.testing.assert_close(found.confusion[model], costs[model][1])
        assert abs(found.costs[model] - float(costs[model][0].mean())) < 1e-6
        right = (logits.argmax(1) == labels)[known].double().mean()
        assert abs(found.accuracy[model] - float(right)) < 1e-6
    difference = costs[1][0] - costs[0][0]
    assert abs(found.standard_error - float(difference.std()) / len(difference) ** 0.5) < 1e-6


def test_positions_of_a_sample_are_averaged_and_padding_does_not_count(generator):
    one, other = torch.randn(2, 2, 4, 3, generator=generator)
    labels, tokens = torch.randint(3, (2, 4), generator=generator), torch.ones(2, 4, dtype=torch.bool)
    tokens[0, 1:] = False
    tally, apart = Tally(Utility(MATRIX)), Tally(Utility(MATRIX))
    tally.add(one, other, labels, tokens)
    apart.add(one[0, :1], other[0, :1], labels[0, :1])
    rest = Tally(Utility(MATRIX))
    rest.add(one[1], other[1], labels[1])
    found, first, second = (each.decisions("labels") for each in (tally, apart, rest))
    assert found.samples == 2
    assert abs(found.costs[1] - (first.costs[1] + second.costs[1]) / 2) < 1e-6
    torch.testing.assert_close(found.confusion, (first.confusion + second.confusion) / 2)


def test_expected_costs_need_no_labels_and_the_float_model_s_are_least(generator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        model[4].weight.mul_(10)
    x = torch.randn(128, 6, generator=generator)
    calibration = calibration_set(model, *x.split(32))
    network = calibrated_network(model, calibration, weight_bits=2, activation_bits=2, edge_bits=None)
    utility = Utility(MATRIX)
    found = expected_decisions(network, calibration, utility)
    with torch.no_grad(), network.quantized(False):
        probabilities = torch.cat([model(batch) for batch in x.split(32)]).softmax(1)
    assert abs(found.costs[0] - float(utility.expected_costs(probabilities).min(1).values.mean())) < 1e-5
    assert found.samples == len(x) and abs(float(found.confusion[0].sum()) - 1) < 1e-6
    # Two bits change many decisions, each for one that is expected to cost more.
    assert found.changed > 0.02 and found.rise > 0.001


def test_only_rows_that_count_are_counted():
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    tally = Tally(Utility([[0, 1], [10, 0]]))
    tally.add(logits, -logits, torch.tensor([0, 0, 0, 1]), torch.tensor([True, True, False, False]))
    found = tally.decisions("labels")
    assert found.samples == 2 and found.costs == (0.0, 10.0)
