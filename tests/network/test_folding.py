import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lightning_calibtip.network.folding import FoldedBatchNorm, apply_fold, prove_folds
from lightning_calibtip.network.layer_types import register_layer
from lightning_calibtip.network.observe import record
from lightning_calibtip.network.tying import bake_parametrizations, find_ties, own_parameter
from tests.conftest import randomize_batch_norms


def fold(model, *inputs):
    """Fold a copy; returns it, the folds as pairs, and what was left with the reason."""
    model.eval()
    randomize_batch_norms(model, torch.Generator().manual_seed(1))
    folded = copy.deepcopy(model)
    folds, left = proved(folded, *inputs)
    layers = {fold.layer: folded.get_submodule(fold.layer) for fold in folds}
    ties = find_ties(folded, layers)
    for name, layer in layers.items():
        bake_parametrizations(layer)
        for parameter in ties.copies.get(name, ()):
            own_parameter(layer, parameter)
    for pair in folds:
        apply_fold(folded, pair)
    with torch.no_grad():
        for got, wanted in zip(_tuple(folded(*inputs)), _tuple(model(*inputs)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    return folded, [(f.layer, f.normalization) for f in folds], left


def proved(model, *inputs):
    """Prove folds and see to it that the model has not changed in any way."""
    before = state_of(model)
    folds, left = prove_folds(model, record(model, lambda: model(*inputs)), lambda: model(*inputs))
    after = state_of(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key
    return folds, left


def state_of(model):
    """Classes, hooks and tensors by identity, and all values."""
    state = {f"value {name}": value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        state[f"class {name}"] = (id(module), type(module))
        state[f"hooks {name}"] = (list(module._forward_pre_hooks), list(module._forward_hooks))
        state[f"children {name}"] = {key: id(child) for key, child in module._modules.items()}
        state[f"parameters {name}"] = {key: (id(p), getattr(p, "_version", 0)) for key, p in module._parameters.items()}
    return state


def _tuple(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize(
    "layer,norm,shape",
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 2, bias=False), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 4, 4, 4)),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (8, 4)),
        (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 9, 9)),
    ],
)
def test_every_kind_of_layer_folds(layer, norm, shape):
    if norm.weight is None:
        norm.weight, norm.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
    folded, folds, left = fold(nn.Sequential(layer, norm, nn.ReLU(inplace=True)), torch.randn(shape))
    assert folds == [("0", "1")] and not left
    assert isinstance(folded[1], FoldedBatchNorm)


def test_subclass_with_its_own_forward_folds():
    class SamePadding(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    _, folds, _ = fold(nn.Sequential(SamePadding(3, 5, 3, bias=False), nn.BatchNorm2d(5)), torch.randn(2, 3, 6, 6))
    assert folds == [("0", "1")]


def test_subclass_that_ignores_its_bias_is_left_alone_with_a_reason():
    class NoBias(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight)

    _, folds, left = fold(nn.Sequential(NoBias(3, 5, 3), nn.BatchNorm2d(5)), torch.randn(2, 3, 6, 6))
    assert not folds and "changes the output" in left["1"]


class _Branching(nn.Module):
    def __init__(self, second):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.second = second

    def forward(self, x):
        y = self.conv(x)
        return self.second(self, y)


@pytest.mark.parametrize(
    "second",
    [
        lambda self, y: self.bn(y) + y,
        lambda self, y: (self.bn(y), y),
        lambda self, y: self.bn(y) * y.mean(),
        lambda self, y: self.bn(y.add_(1)),
        lambda self, y: self.bn(F.relu(y)),
        lambda self, y: self.bn(y) + self.bn(y * 2),
    ],
    ids=["added", "returned", "pooled", "changed in place", "after relu", "BatchNorm used twice"],
)
def test_output_with_another_reader_is_not_folded(second):
    _, folds, left = fold(_Branching(second), torch.randn(2, 3, 4, 4))
    assert not folds and "bn" in left


def test_one_convolution_before_two_batch_norms_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.a(self.conv(x)) + self.b(self.conv(-x))

    _, folds, _ = fold(Shared(), torch.randn(2, 3, 4, 4))
    assert not folds


def test_a_pair_that_runs_twice_together_folds():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(self.bn(self.conv(x))))

    _, folds, _ = fold(Twice(), torch.randn(2, 3, 4, 4))
    assert folds == [("conv", "bn")]


class NormAct(nn.BatchNorm2d):
    """As timm has it: an activation function of its own goes with the normalization."""

    def __init__(self, features, act):
        super().__init__(features)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(5, 0.3)])
def test_a_batch_norm_that_holds_an_activation_function_folds_and_leaves_it(act):
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), NormAct(5, act), nn.Conv2d(5, 2, 1))
    folded, folds, left = fold(model, torch.randn(2, 3, 6, 6))
    assert folds == [("0", "1")] and not left
    assert isinstance(folded[1], FoldedBatchNorm) and type(folded[1].act) is type(act)
    if isinstance(act, nn.PReLU):
        assert torch.equal(folded[1].act.weight, act.weight)


def test_a_batch_norm_that_does_more_without_a_module_is_left_alone():
    class NormRelu(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    _, folds, left = fold(nn.Sequential(nn.Conv2d(3, 3, 1), NormRelu(3)), torch.randn(2, 3, 4, 4))
    assert not folds and "changes the output" in left["1"]


class FrozenBatchNorm(nn.Module):
    """As DETR has it: what training has found, as buffers, and no ``eps`` to be seen."""

    def __init__(self, features):
        super().__init__()
        for name, value in (("weight", 2.0), ("bias", 0.5), ("running_mean", 0.3), ("running_var", 0.7)):
            self.register_buffer(name, torch.full((features,), value) + torch.rand(features))

    def forward(self, x):
        weight, bias, mean, var = (
            each.view(1, -1, 1, 1) for each in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def test_frozen_batch_norms_fold_or_are_listed():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), FrozenBatchNorm(5), nn.ReLU(), FrozenBatchNorm(5))
    folded, folds, left = fold(model, torch.randn(2, 3, 6, 6))
    assert folds == [("0", "1")] and isinstance(folded[1], FoldedBatchNorm)
    assert left == {"3": "no convolution or linear layer right before it"}


def test_a_batch_norm_that_holds_other_modules_is_left_alone():
    class Gated(nn.BatchNorm2d):
        def __init__(self, features):
            super().__init__(features)
            self.gate = nn.Linear(7, 7)

    _, folds, left = fold(nn.Sequential(nn.Conv2d(3, 4, 3), Gated(4)), torch.randn(2, 3, 6, 6))
    assert not folds and "changes the output" in left["1"]


class LinearNorm(nn.Module):
    """As LeViT has it: the normalization reads all tokens as one batch."""

    def __init__(self, view):
        super().__init__()
        self.linear, self.norm, self.view = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), view

    def forward(self, x):
        y = self.linear(x)
        return self.norm(self.view(y)).reshape_as(y)


def test_a_batch_norm_after_a_view_of_a_linear_layer_folds():
    _, folds, left = fold(LinearNorm(lambda y: y.flatten(0, 1)), torch.randn(3, 7, 4))
    assert folds == [("linear", "norm")] and not left


@pytest.mark.parametrize("view", [lambda y: y[:, :3].flatten(0, 1), lambda y: y.reshape(-1, 6).roll(1, -1)])
def test_a_batch_norm_after_another_tensor_does_not_fold(view):
    class Sum(LinearNorm):
        def forward(self, x):
            return self.norm(self.view(self.linear(x))).sum()

    _, folds, left = fold(Sum(view), torch.randn(3, 7, 4))
    assert not folds and "norm" in left


def test_a_fold_is_proved_on_some_samples_of_a_large_batch():
    sizes = []

    class Watched(nn.Conv2d):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    _, folds, _ = fold(nn.Sequential(Watched(3, 5, 3), nn.BatchNorm2d(5)), torch.randn(40, 3, 6, 6))
    # Watched once while the structure is recorded, once while the fold is proved, and twice by the test.
    assert folds and sorted(sizes) == [8, 40, 40, 40, 40]


def test_batch_norm_over_another_dimension_is_left_alone():
    _, folds, left = fold(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)), torch.randn(2, 5, 4))
    assert not folds and "another dimension" in left["1"]


def test_batch_norm_under_two_names_is_replaced_under_both():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model.alias = model[1]

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.alias = self.bn

        def forward(self, x):
            return self.alias(self.conv(x))

    folded, folds, _ = fold(Wrapper(), torch.randn(2, 3, 4, 4))
    assert folds and folded.bn is folded.alias and isinstance(folded.bn, FoldedBatchNorm)


def test_folded_batch_norm_remembers_the_deviation_it_had_in_training():
    norm = nn.BatchNorm2d(2).eval()
    norm.weight.data = torch.tensor([2.0, -3.0])
    norm.running_var = torch.tensor([4.0, 1e-5])
    x = torch.randn(40_000, 2, 1, 1) * norm.running_var.sqrt().view(1, 2, 1, 1)
    torch.testing.assert_close(norm(x).std((0, 2, 3)), FoldedBatchNorm(norm).deviation, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_layer_folds_and_proving_leaves_it_parametrized(parametrize):
    model = nn.Sequential(parametrize(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
    folded, folds, left = fold(model, torch.randn(2, 3, 6, 6))
    assert folds == [("0", "1")] and not left
    assert type(folded[0]) is nn.Conv2d and isinstance(folded[1], FoldedBatchNorm)


def test_convolutions_that_share_a_weight_fold_each_with_its_own_batch_norm():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
            self.b.weight = self.c.weight = self.a.weight
            self.norm_a, self.norm_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.c(self.norm_b(self.b(self.norm_a(self.a(x)))))

    _, folds, left = fold(Siamese(), torch.randn(2, 3, 4, 4))
    assert folds == [("a", "norm_a"), ("b", "norm_b")] and not left


def test_a_weight_that_is_an_embedding_as_well_is_not_folded_into():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out, self.norm = nn.Embedding(6, 4), nn.Linear(4, 6), nn.BatchNorm1d(6)
            self.out.weight = self.table.weight

        def forward(self, indices):
            return self.norm(self.out(self.table(indices)))

    _, folds, left = fold(Tied(), torch.tensor([0, 3, 5]))
    assert not folds and left == {"norm": "the layer's weight is also that of the embedding table"}


class Mixing(nn.Module):
    """A linear layer whose weight is transposed and has a name of its own."""

    def __init__(self, bias):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 6))
        if bias:
            self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        y = x @ self.kernel
        return y if getattr(self, "bias", None) is None else y + self.bias


def test_a_layer_whose_weight_has_another_name_and_axis_folds_if_it_has_a_bias():
    register_layer(Mixing, channel_axis=1, weight="kernel")
    _, folds, left = fold(nn.Sequential(Mixing(bias=True), nn.BatchNorm1d(6)), torch.randn(5, 4))
    assert folds == [("0", "1")] and not left
    _, folds, left = fold(nn.Sequential(Mixing(bias=False), nn.BatchNorm1d(6)), torch.randn(5, 4))
    assert not folds and left == {"1": "the layer's weight or bias is not a plain parameter"}


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


def test_a_failing_batch_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(2, 4)
    structure, before = record(model, lambda: model(x)), state_of(model)

    def fail():
        model(x)
        raise RuntimeError("no second batch")

    with pytest.raises(RuntimeError, match="no second batch"):
        prove_folds(model, structure, fail)
    assert state_of(model).keys() == before.keys()
    assert state_of(model)["hooks 0"] == before["hooks 0"] == ([], [])
