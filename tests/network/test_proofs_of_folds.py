"""Which folds must be proved by a run, and which are kept back by what else reads a layer's parameters."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lightning_calibtip.network.folding import prove_folds
from lightning_calibtip.network.observe import record
from tests.conftest import randomize_batch_norms

from .folds import fold, proved


def convolution_and_norm(change):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    randomize_batch_norms(model, torch.Generator().manual_seed(1))
    change(model)
    x = torch.randn(2, 3, 4, 4)
    runs = []
    structure = record(model, lambda: model(x))
    folds, left = prove_folds(model, structure, lambda: runs.append(model(x)))
    return len(runs), len(folds), left


def test_a_plain_convolution_before_a_plain_batch_norm_needs_no_run():
    assert convolution_and_norm(lambda model: None) == (0, 1, {})


def _in_training(model, x):
    model[1].train()
    try:
        return model[1](model[0](x))
    finally:
        model[1].eval()


def doubled(x):
    return 2 * nn.functional.conv2d(x, torch.ones(3, 3, 1, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[0], "forward", doubled),
        lambda model: model[0].register_forward_hook(lambda module, args, output: 2 * output),
        lambda model: model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda model: model[1].register_forward_hook(lambda module, args, output: 2 * output),
        lambda model: model[1].train(),
        lambda model: model[1].running_var.fill_(float("nan")),
        lambda model: setattr(model, "forward", functools.partial(_in_training, model)),
    ],
    ids=["own forward", "hook", "hook before", "norm's hook", "norm in training", "NaN", "norm in training in forward"],
)
def test_what_was_changed_must_be_proved_by_a_run(change):
    with torch.no_grad():
        runs, folds, left = convolution_and_norm(change)
    assert runs == 1 and folds + len(left) == 1


@pytest.mark.parametrize("eps", [np.float32(0.5), torch.tensor(0.5)])
def test_eps_of_another_type_folds_as_it_is(eps):
    _, folds, _ = fold(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=eps)), torch.randn(2, 3, 6, 6))
    assert folds == [("0", "1")]


class _Tied(nn.Module):
    def __init__(self, layer, norm, read):
        super().__init__()
        self.layer, self.norm, self.read = layer, norm, read

    def forward(self, x):
        return self.read(self.layer, self.norm(self.layer(x)))


@pytest.mark.parametrize(
    "layer,norm,shape,read",
    [
        (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), (2, 3, 7, 7), lambda layer, y: F.conv_transpose2d(y, layer.weight)),
        (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), (2, 3, 7, 7), lambda layer, y: y / layer.weight.norm()),
        (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), (2, 3, 7, 7), lambda layer, y: (y, layer.bias * 2)),
        (nn.Linear(3, 6), nn.BatchNorm1d(6), (5, 3), lambda layer, y: F.linear(y, layer.weight.t())),
    ],
    ids=["transposed convolution", "norm", "bias", "transposed linear"],
)
@pytest.mark.parametrize("is_parametrized", [False, True])
def test_a_layer_whose_parameters_are_read_elsewhere_is_not_folded_into(layer, norm, shape, read, is_parametrized):
    layer = parametrizations.weight_norm(copy.deepcopy(layer)) if is_parametrized else layer
    _, folds, left = fold(_Tied(layer, copy.deepcopy(norm), read), torch.randn(shape))
    assert not folds and "is also read outside of it, by" in left["norm"]


def _remember(layer, y):
    layer.penalty = layer.weight.square().sum()
    return y


@pytest.mark.parametrize(
    "read",
    [lambda layer, y: y + y.new_zeros(1) + torch.zeros_like(layer.bias[:1]), _remember],
    ids=["no value", "not of the output"],
)
def test_reads_that_the_output_does_not_depend_on_do_not_keep_a_fold_back(read):
    model = _Tied(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), read).eval()
    x = torch.randn(2, 3, 7, 7)
    with torch.no_grad():
        folds, left = prove_folds(model, record(model, lambda: model(x)), lambda: model(x))
    assert len(folds) == 1 and not left


def test_parameters_that_are_parts_of_one_storage_do_not_keep_folds_back():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, model.parameters())
    structure = record(model.eval(), lambda: model(torch.randn(2, 3, 8, 8)))
    folds, left = prove_folds(model, structure, lambda: model(torch.randn(2, 3, 8, 8)))
    assert len(folds) == 2 and not left


def test_a_convolution_without_a_dimension_of_samples_is_not_folded():
    # BatchNorm1d takes (channels, length) for (samples, channels).
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)).eval()
    randomize_batch_norms(model, torch.Generator().manual_seed(1))
    folds, left = proved(model, torch.randn(2, 4))
    assert not folds and "changes the output" in left["1"]
