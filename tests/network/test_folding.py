import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lightning_calibtip.network.folding import FoldedBatchNorm, prove_folds
from lightning_calibtip.network.layer_types import register_layer
from lightning_calibtip.network.observe import record

from .folds import fold, state_of


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
