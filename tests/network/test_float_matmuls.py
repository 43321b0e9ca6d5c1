import pytest
import torch
import torchvision
from torch import nn

from lightning_calibtip.network.float_matmuls import find_float_matmuls
from lightning_calibtip.network.observe import record


class Distances(nn.Module):
    def forward(self, x):
        return torch.cdist(x, x)


class Offsets(nn.Module):
    def __init__(self):
        super().__init__()
        self.deformed = torchvision.ops.DeformConv2d(3, 4, 3)

    def forward(self, x):
        return self.deformed(x, x.new_zeros(1, 18, 3, 3))


@pytest.mark.parametrize(
    "module, x, operator",
    [
        (nn.EmbeddingBag(5, 3), torch.tensor([[0, 1]]), "embedding_bag"),
        (Distances(), torch.ones(2, 3), "cdist_forward"),
        (Offsets(), torch.ones(1, 3, 5, 5), "torchvision::deform_conv2d"),
        (nn.LSTM(3, 3), torch.ones(2, 3), "rnn"),
    ],
)
def test_what_multiplies_in_float_is_listed(module, x, operator):
    found = find_float_matmuls(record(module.eval(), lambda: module(x)), known=[])
    assert any(operator in reason for reason in found.values()), found


def test_products_of_three_tensors_are_listed():
    module = nn.Bilinear(3, 3, 2)
    found = find_float_matmuls(record(module, lambda: module(torch.ones(1, 3), torch.ones(1, 3))), known=[])
    assert "trilinear" in found[""]
