import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.quantization.folding import FoldedBatchNorm, fold_batch_norm
from lightning_calibtip.quantization.structure import observe_structure
from tests.conftest import randomize_batch_norms


def fold(model, *inputs):
    """Fold a copy; returns it, the folds as pairs, and what was left with the reason."""
    model.eval()
    randomize_batch_norms(model, torch.Generator().manual_seed(1))
    folded = copy.deepcopy(model)

    def run():
        return folded(*inputs)

    folds, left = fold_batch_norm(folded, observe_structure(folded, run), run)
    with torch.no_grad():
        for got, wanted in zip(_tuple(folded(*inputs)), _tuple(model(*inputs)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    return folded, [(f.layer, f.normalization) for f in folds], left


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


def test_batch_norm_with_a_forward_of_its_own_is_left_alone():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    _, folds, left = fold(nn.Sequential(nn.Conv2d(3, 3, 1), NormAct(3)), torch.randn(2, 3, 4, 4))
    assert not folds and "forward of its own" in left["1"]


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
