"""Which modules take in the ratios of equalized tensors: only where nothing but positive factors lies between."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.network.absorption import find_absorbers
from lightning_calibtip.network.network import QuantizedNetwork
from lightning_calibtip.network.scheme import QuantizationScheme


class Between(nn.Module):
    """Two linear layers with a function between them, and what comes out of both."""

    def __init__(self, between=torch.relu, first=None, combine=lambda second, between: second):
        super().__init__()
        self.first, self.second = first or nn.Linear(4, 6), nn.Linear(6, 3)
        self.between, self.combine = between, combine

    def forward(self, x):
        value = self.between(self.first(x))
        return self.combine(self.second(value), value)


class Saturating(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Twice(nn.Module):
    """One head reads what two layers write."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.a(x))) + 2 * self.head(torch.relu(self.c(x)))


class Normed(nn.Module):
    def __init__(self, reads_again):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.reads_again = reads_again

    def forward(self, x):
        normed = self.norm(x)
        hidden = self.first(normed)
        return self.second(torch.tanh(hidden + normed if self.reads_again else hidden))


def absorbers(model, x, **scheme):
    network = QuantizedNetwork(model.eval(), QuantizationScheme(**scheme))
    network.prepare(lambda: model(x))
    return {tensor.name: name for tensor, name in find_absorbers(model, network.structure, network.layers).items()}


TOKENS = torch.randn(2, 5, 4)


@pytest.mark.parametrize("model", [
    Between(), Between(lambda x: x), Between(lambda x: F.relu(x, inplace=True)), Between(F.leaky_relu),
    Between(lambda x: x.clone()), Between(lambda x: x.contiguous()), Between(lambda x: x.view(x.shape)),
])  # fmt: skip
def test_positive_factors_pass(model):
    assert absorbers(model, TOKENS) == {"second input": "first"}


@pytest.mark.parametrize("model", [
    Between(torch.tanh), Between(F.relu6), Between(F.gelu), Between(lambda x: x + 1), Between(lambda x: x.flip(-1)),
    Between(lambda x: x.roll(3, -1)), Between(lambda x: x.index_select(-1, torch.tensor([1, 0, 2, 5, 4, 3]))),
    Between(lambda x: F.max_pool2d(x, 3, 1, 1)), Between(lambda x: x.transpose(1, 2).reshape(x.shape)),
    Between(first=Saturating(4, 6)), Between(combine=lambda second, value: second.mean() + value.mean()),
    Between(combine=lambda second, value: (second, value)), Twice(),
])  # fmt: skip
def test_anything_else_does_not(model):
    assert absorbers(model, TOKENS) == {}


def test_maxima_over_images_pass_and_scales_for_the_whole_weight_cannot_take_ratios():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 8, 8)
    assert absorbers(model, x) == {"3 input": "0"}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert absorbers(model, x, per_channel=False) == {}


@pytest.mark.parametrize("reads_again, names", [(False, {"first input": "norm"}), (True, {})])
def test_a_normalization_takes_ratios_in_where_nothing_else_reads_it(reads_again, names):
    assert absorbers(Normed(reads_again), TOKENS) == names
