import pytest
import torch

from lightning_calibtip.quantization.affine import choose_qparams, fake_quantize
from lightning_calibtip.quantization.ranges import RangeOptions, register_range_method, weight_range
from lightning_calibtip.quantization.spec import PerChannel, PerGroup, TensorSpec


def quantization_error(x, low, high, bits, symmetric, p=2.0):
    spec = TensorSpec(bits, symmetric)
    scale, zero_point = choose_qparams(low, high, spec)
    return ((fake_quantize(x, scale, zero_point, spec.qmin, spec.qmax) - x).abs() ** p).sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method,p", [("mse", 2.0), ("lp", 3.0)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lp_optimal_range_is_close_to_the_best_of_a_dense_grid(symmetric, method, p, bits):
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1)) ** 3 + 0.5
    low, high = weight_range(x, TensorSpec(bits, symmetric), RangeOptions(weight_observer=method, p=p))
    found = quantization_error(x, low, high, bits, symmetric, p)
    grid = torch.linspace(0.02, 1, 60).tolist()
    best = min(
        quantization_error(x, x.min().view(1) * a, x.max().view(1) * (a if symmetric else b), bits, symmetric, p)
        for a in grid
        for b in ([1.0] if symmetric else grid)
    )
    # Not a tolerance of rounding: a line search may stop short of the best of all pairs by a few per cent.
    assert float(found) <= float(best) * 1.05


def test_min_max_range_per_channel_is_each_channels_own():
    weight = torch.tensor([[1.0, -2.0], [0.0, 8.0]])
    low, high = weight_range(weight, TensorSpec(4, granularity=PerChannel(0)), RangeOptions(weight_observer="minmax"))
    assert low.tolist() == [-2.0, 0.0] and high.tolist() == [1.0, 8.0]


def test_percentile_range_leaves_outliers_out():
    x = torch.cat([torch.linspace(-1, 1, 10_001), torch.tensor([50.0])])
    _, high = weight_range(x, TensorSpec(8), RangeOptions(weight_observer="percentile", percentile=99.9))
    assert 0.99 < float(high) <= 1.0


def test_dead_channel_keeps_a_usable_range():
    weight = torch.zeros(2, 3)
    weight[1] = torch.tensor([1.0, -1.0, 0.5])
    for method in ("minmax", "percentile", "mse", "lp"):
        spec = TensorSpec(4, granularity=PerChannel(0))
        low, high = weight_range(weight, spec, RangeOptions(weight_observer=method))
        scale, zero_point = choose_qparams(low, high, spec)
        assert torch.equal(fake_quantize(weight, scale, zero_point, 0, 15, 0)[0], torch.zeros(3))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "lp"])
@pytest.mark.parametrize("columns", [70, 64, 20])
def test_the_range_of_a_group_is_that_of_its_weights_alone(method, columns):
    # All above zero, so that zeros in a shorter group would show.
    weight = torch.rand(3, columns, generator=torch.Generator().manual_seed(0)) + 0.5
    options = RangeOptions(weight_observer=method)
    low, high = weight_range(weight, TensorSpec(4, granularity=PerGroup(32)), options)
    groups = [group for channel in weight for group in channel.split(32)]
    wanted = [weight_range(group, TensorSpec(4), options) for group in groups]
    # The order of the search's float32 sums may depend on the shape, and so may which of two equal losses wins: the
    # ends of neighbouring tries are 0.005 of the range apart.
    torch.testing.assert_close(low, torch.cat([least for least, _ in wanted]), rtol=6e-3, atol=1e-6)
    torch.testing.assert_close(high, torch.cat([most for _, most in wanted]), rtol=6e-3, atol=1e-6)


def test_methods_of_ones_own_see_no_padding_either():
    seen = []

    @register_range_method("spy")
    def spy(rows, spec, options):
        seen.append(rows.shape)
        return rows.amin(1), rows.amax(1)

    spec = TensorSpec(4, granularity=PerGroup(32, 1))
    low, high = weight_range(torch.ones(5, 3, 14), spec, RangeOptions(weight_observer="spy"))
    assert seen == [(6, 32), (3, 6)] and low.tolist() == [1.0] * 9 and high.tolist() == [1.0] * 9


def test_groups_come_in_the_order_of_the_scales():
    weight = torch.arange(14.0).view(2, 7)
    spec, options = TensorSpec(4, granularity=PerGroup(3)), RangeOptions(weight_observer="minmax")
    low, high = weight_range(weight, spec, options)
    assert low.tolist() == [0, 3, 6, 7, 10, 13] and high.tolist() == [2, 5, 6, 9, 12, 13]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"momentum": 0.0}, "momentum must be above 0 and at most 1, got 0.0"),
        ({"momentum": 1.1}, "momentum must be above 0 and at most 1, got 1.1"),
        ({"percentile": 50.0}, "percentile must be above 50 and at most 100"),
        ({"percentile": float("nan")}, "percentile must be above 50 and at most 100"),
        ({"p": -1.0}, "p must be above 0, got -1.0"),
    ],
)
def test_options_out_of_range_are_refused_at_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        RangeOptions(**changes)


def test_a_registered_method_chooses_ranges_of_weights():
    @register_range_method("twice_the_mean")
    def twice_the_mean(rows, spec, options):
        return -2 * rows.abs().mean(1), 2 * rows.abs().mean(1)

    low, high = weight_range(
        torch.tensor([[1.0, -3.0]]), TensorSpec(4, granularity=PerChannel(0)), RangeOptions("mse", "twice_the_mean")
    )
    assert (low.item(), high.item()) == (-4.0, 4.0)
