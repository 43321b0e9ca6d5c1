import pytest
import torch
from torch import nn

from lightning_calibtip.allocation.groups import named_groups, sharing_a_weight
from tests.networks import calibrated_network, calibration_set


def prepared(model, x):
    return calibrated_network(model.eval(), calibration_set(model, x))


def test_named_groups_take_patterns_and_name_what_is_unknown():
    network = prepared(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(2, 3))
    assert named_groups(network, [["0", "[2-9]"]]) == [["0", "2"]]
    with pytest.raises(ValueError, match="'fc' matches no quantized layer; these are: 0, 1"):
        named_groups(network, [["fc", "1"]])
    with pytest.raises(ValueError, match="groups must be lists of names or patterns, got '1'"):
        named_groups(network, ["1"])


def test_layers_tied_to_an_embedding_form_a_group():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return self.out(self.embed(tokens))

    assert sharing_a_weight(prepared(Tied(), torch.randint(0, 10, (4, 3)))) == [["embed", "out"]]
