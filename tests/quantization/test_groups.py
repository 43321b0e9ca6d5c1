import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_calibtip.quantization.groups import from_groups, groups_per_channel, to_groups
from tests.properties import examples


@given(st.lists(st.integers(1, 7), min_size=2, max_size=4), st.integers(0, 3), st.integers(1, 40))
@examples(100)
def test_groups_hold_consecutive_weights_of_one_channel_and_come_back(shape, axis, size):
    axis %= len(shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(size))
    rows = to_groups(weight, axis, size)
    assert rows.shape == (shape[axis] * groups_per_channel(shape, axis, size), size)
    channels = weight.movedim(axis, 0).flatten(1)
    for channel, of_channel in zip(channels, rows.view(shape[axis], -1), strict=True):
        assert torch.equal(of_channel[: len(channel)], channel) and not of_channel[len(channel) :].any()
    assert torch.equal(from_groups(rows, weight.shape, axis), weight)


def test_gradients_pass_through_groups():
    weight = torch.randn(3, 5, requires_grad=True)
    (from_groups(to_groups(weight, 0, 2) * 3, weight.shape, 0)).sum().backward()
    assert torch.equal(weight.grad, torch.full((3, 5), 3.0))
