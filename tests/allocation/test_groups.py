import pytest
import torch
from torch import nn

from lightning_calibtip.allocation.groups import named_groups, sharing_a_weight
from lightning_calibtip.network.dataflow import layers_feeding_an_add, layers_sharing_an_input
from tests.networks import calibrated_network, calibration_set


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return x + self.out(weights @ self.value(x))


class Joins(nn.Module):
    """Two convolutions meet after a BatchNorm and a ReLU; a sum and a layer meet as well."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.after = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        joined = torch.relu_(self.norm(self.left(x))) + self.right(x)
        return self.last(joined + self.after(joined))


def prepared(model, x):
    return calibrated_network(model.eval(), calibration_set(model, x))


def test_layers_that_read_one_tensor():
    network = prepared(Attention(), torch.randn(2, 5, 8))
    assert layers_sharing_an_input(network.structure, network.layers) == [["query", "key", "value"]]
    assert layers_feeding_an_add(network.structure, network.layers) == []


def test_layers_that_feed_one_add():
    network = prepared(Joins(), torch.randn(2, 4, 6, 6))
    assert layers_feeding_an_add(network.structure, network.layers) == [["left", "right"]]
    assert layers_sharing_an_input(network.structure, network.layers) == [["left", "right"]]


def test_an_identity_shortcut_of_a_sum_makes_no_group(tiny_resnet, images):
    network = prepared(tiny_resnet, images[:2])
    # The first block's shortcut is the stem's output, the second's is a sum.
    assert [set(group) for group in layers_feeding_an_add(network.structure, network.layers)] == [
        {"stem", "blocks.0.conv2"}
    ]


def test_named_groups_take_patterns_and_name_what_is_unknown():
    network = prepared(Attention(), torch.randn(2, 5, 8))
    assert named_groups(network, [["query", "k*"]]) == [["query", "key"]]
    with pytest.raises(ValueError, match="'querry' matches no quantized layer; these are: query, key"):
        named_groups(network, [["querry", "key"]])
    with pytest.raises(ValueError, match="groups must be lists of names or patterns, got 'query'"):
        named_groups(network, ["query"])


def test_layers_tied_to_an_embedding_form_a_group():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return self.out(self.embed(tokens))

    assert sharing_a_weight(prepared(Tied(), torch.randint(0, 10, (4, 3)))) == [["embed", "out"]]
