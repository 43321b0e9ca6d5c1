"""The registry of layer types."""

import pytest
import torch
from torch import nn

from lightning_calibtip.network.layer_types import (
    LayerType,
    Operand,
    layer_type_of,
    quantizable_layers,
    reads_indices,
    register_layer,
)

LINEAR = LayerType(operands=(Operand(channel_axis=-1),), adds_bias=True, input_axis=1)


class Mixture(nn.Module):
    """A layer with a weight of another name and three inputs."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 3))

    def forward(self, a, b, *, c):
        return (a + b + c) @ self.kernel


def test_a_weight_of_another_name_and_three_inputs_are_registered():
    operands = [Operand(), Operand(nonnegative=True), Operand(())]
    register_layer(Mixture, 1, operands, (1, 2), "kernel")
    assert layer_type_of(Mixture()) == LayerType("kernel", 1, tuple(operands), (1, 2))
    assert hash(layer_type_of(Mixture()))


def test_subclasses_are_of_the_type_of_their_nearest_registered_class():
    class Sub(nn.Linear):
        pass

    class Own(Sub):
        pass

    assert layer_type_of(Own(2, 2)) == layer_type_of(nn.Linear(2, 2)) == LINEAR
    register_layer(Sub, 0, [Operand(nonnegative=True)])
    assert layer_type_of(Own(2, 2)).operands == (Operand(nonnegative=True),)
    assert layer_type_of(nn.Linear(2, 2)) == LINEAR


def test_a_product_of_two_inputs_has_no_weight():
    class Product(nn.Module):
        pass

    register_layer(Product, None, [Operand(), Operand((-2,))])
    assert layer_type_of(Product()).weight is None and not reads_indices(Product())


def test_what_has_nothing_to_quantize_is_refused():
    with pytest.raises(ValueError, match="Mixture has neither a weight nor an operand to quantize"):
        register_layer(Mixture, None, [])


@pytest.mark.parametrize("name", ["", "mixer.weight", "weight 2", None])
def test_a_weight_that_no_parameter_can_be_called_is_refused(name):
    with pytest.raises(ValueError, match="Mixture: weight must be the name of the parameter that is its weight, got"):
        register_layer(Mixture, weight=name)


@pytest.mark.parametrize("options", [{"weight": None}, {"channel_axis": None}])
def test_a_weight_and_its_channels_come_together(options):
    with pytest.raises(ValueError, match="weight and channel_axis must both be None or neither"):
        LayerType(**options)


@pytest.mark.parametrize(
    "layer,axis,dynamic,tokens",
    [
        (nn.Conv1d(1, 2, 1), 0, (-2, -1), (2,)),
        (nn.Conv2d(1, 2, 1), 0, (-3, -2, -1), ()),
        (nn.Conv3d(1, 2, 1), 0, (-4, -3, -2, -1), ()),
        (nn.ConvTranspose1d(1, 2, 1), 1, (-2, -1), (2,)),
        (nn.ConvTranspose2d(1, 2, 1), 1, (-3, -2, -1), ()),
        (nn.ConvTranspose3d(1, 2, 1), 1, (-4, -3, -2, -1), ()),
        (nn.Linear(1, 2), 0, (-1,), (1,)),
    ],
)
def test_layers_of_torch_are_registered(layer, axis, dynamic, tokens):
    found = layer_type_of(layer)
    # Engines have no transposed convolutions of integers. Channels are the first of the dimensions that it sums over.
    operand = Operand(dynamic, tokens, channel_axis=dynamic[0])
    assert found == LayerType("weight", axis, (operand,), tokens, adds_bias=axis == 0, input_axis=1 - axis)


def test_an_embedding_reads_indices():
    assert layer_type_of(nn.Embedding(3, 2)) == LayerType("weight", 0, (), (1,))
    assert reads_indices(nn.Embedding(3, 2)) and not reads_indices(nn.Linear(2, 2)) and not reads_indices(nn.ReLU())


def test_quantizable_layers_are_found_by_their_full_names():
    model = nn.Sequential(nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2)), nn.Flatten(), nn.Linear(2, 2))
    assert quantizable_layers(model) == {"0.0": model[0][0], "2": model[2]}
