import pytest
import torch

from lightning_calibtip.quantization.affine import choose_qparams, fake_quantize, integer_range
from lightning_calibtip.quantization.ranges import check_range_method, weight_range


def quantization_error(x, low, high, bits, symmetric, p=2.0):
    scale, zero_point = choose_qparams(low, high, bits, symmetric)
    return ((fake_quantize(x, scale, zero_point, *integer_range(bits, symmetric)) - x).abs() ** p).sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method,p", [("mse", 2.0), ("lp", 3.0)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lp_optimal_range_is_close_to_the_best_of_a_dense_grid(symmetric, method, p, bits):
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1)) ** 3 + 0.5
    low, high = weight_range(x, bits, symmetric, None, method, p=p)
    found = quantization_error(x, low, high, bits, symmetric, p)
    grid = torch.linspace(0.02, 1, 60).tolist()
    best = min(
        quantization_error(x, x.min().view(1) * a, x.max().view(1) * (a if symmetric else b), bits, symmetric, p)
        for a in grid
        for b in ([1.0] if symmetric else grid)
    )
    assert float(found) <= float(best) * 1.05


def test_min_max_range_per_channel_is_each_channels_own():
    weight = torch.tensor([[1.0, -2.0], [0.0, 8.0]])
    low, high = weight_range(weight, 4, False, 0, "minmax")
    assert low.tolist() == [-2.0, 0.0] and high.tolist() == [1.0, 8.0]


def test_percentile_range_leaves_outliers_out():
    x = torch.cat([torch.linspace(-1, 1, 10_001), torch.tensor([50.0])])
    _, high = weight_range(x, 8, False, None, "percentile", percentile=99.9)
    assert 0.99 < float(high) <= 1.0


def test_dead_channel_keeps_a_usable_range():
    weight = torch.zeros(2, 3)
    weight[1] = torch.tensor([1.0, -1.0, 0.5])
    for method in ("minmax", "percentile", "mse", "lp"):
        low, high = weight_range(weight, 4, False, 0, method)
        scale, zero_point = choose_qparams(low, high, 4, False)
        assert torch.equal(fake_quantize(weight, scale, zero_point, 0, 15, 0)[0], torch.zeros(3))


def test_unknown_method_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"observer must be one of minmax, .*got 'entropy'"):
        check_range_method("entropy", "observer")
