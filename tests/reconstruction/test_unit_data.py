import pytest
import torch

from lightning_calibtip.calibration.recording import UnitCall
from lightning_calibtip.reconstruction.unit_data import UnitDataset, split_rows
from tests.networks import recorded


def test_samples_of_several_calls_become_one_and_constants_stay():
    mask = torch.ones(1, 3)
    inputs = recorded(
        *[UnitCall((torch.full((n, 2), float(n)),), {"mask": mask.clone(), "flag": True}) for n in (2, 3)]
    )
    dataset = UnitDataset(inputs, recorded(torch.arange(2.0), torch.arange(3.0)))
    assert dataset.count == 5 and not dataset.whole
    batch = dataset.take(torch.tensor([4, 0]))
    assert batch.call.args[0].tolist() == [[3.0, 3.0], [2.0, 2.0]]
    assert torch.equal(batch.call.kwargs["mask"], mask) and batch.call.kwargs["flag"] is True
    assert batch.target.tolist() == [2.0, 0.0]


def test_what_is_the_same_in_all_calls_is_kept_once_even_if_it_is_as_long_as_a_batch():
    mask = torch.rand(4, 4)
    inputs = recorded(*[UnitCall((torch.rand(4, 2),), {"mask": mask.clone()}) for _ in range(2)])
    dataset = UnitDataset(inputs, recorded(torch.zeros(4), torch.ones(4)))
    assert torch.equal(dataset.take(torch.tensor([5])).call.kwargs["mask"], mask)


def test_a_batch_that_comes_twice_is_drawn_from_by_rows():
    whole = torch.arange(8.0).view(4, 2)
    dataset = UnitDataset(recorded(*[UnitCall((whole,), {})] * 2), recorded(whole[:, 0], whole[:, 0]))
    batch = dataset.take(torch.tensor([1, 6]))
    assert batch.call.args[0].tolist() == [[2.0, 3.0], [4.0, 5.0]] and batch.target.tolist() == [2.0, 4.0]


def test_a_single_batch_is_drawn_from_by_rows_beside_a_mask_for_all():
    whole, mask = torch.rand(5, 2), torch.rand(1, 2)
    dataset = UnitDataset(recorded(UnitCall((whole, mask), {})), recorded(whole * mask))
    batch = dataset.take(torch.tensor([3]))
    assert torch.equal(batch.call.args[0], whole[3:4]) and torch.equal(batch.call.args[1], mask)


def test_calls_of_different_shapes_stay_whole():
    inputs = recorded(*[UnitCall((torch.zeros(2, length),), {}) for length in (3, 5)])
    dataset = UnitDataset(inputs, recorded(torch.zeros(2, 3), torch.zeros(2, 5)))
    assert dataset.count == 2 and dataset.whole
    assert dataset.take(torch.tensor([1])).call.args[0].shape == (2, 5)


def test_differently_nested_calls_are_refused():
    inputs = recorded(UnitCall((torch.zeros(2),), {}), UnitCall((torch.zeros(2), torch.zeros(2)), {}))
    with pytest.raises(ValueError, match="differ in which arguments"):
        UnitDataset(inputs, recorded(torch.zeros(2), torch.zeros(2)))


def test_importance_is_drawn_with_the_samples():
    inputs, weights = recorded(UnitCall((torch.zeros(2, 1),), {})), recorded([torch.tensor([[3.0], [1.0]])])
    dataset = UnitDataset(inputs, recorded(torch.zeros(2, 1)), importance=weights)
    assert dataset.take(torch.tensor([1, 0])).importance[0].tolist() == [[1.0], [3.0]]


def test_what_is_drawn_may_be_changed():
    """Constants are kept once, and the error is computed in the target's place."""
    inputs = recorded(*[UnitCall((torch.rand(2, 3), torch.ones(1, 3)), {}) for _ in range(2)])
    dataset = UnitDataset(inputs, recorded(*[(torch.rand(2, 3), torch.ones(1)) for _ in range(2)]))
    batch = dataset.take(torch.tensor([0]))
    for tensor in (*batch.call.args, *batch.target):
        tensor.zero_()
    again = dataset.take(torch.tensor([0]))
    assert all(bool(tensor.all()) for tensor in (*again.call.args, *again.target))


def test_a_constant_as_long_as_the_batch_can_be_drawn_by_rows():
    mask = torch.arange(2.0)
    inputs = recorded(*[UnitCall((torch.rand(2, 3), mask.clone()), {}) for _ in range(2)])
    targets = recorded(torch.rand(2, 3), torch.rand(2, 3))
    assert UnitDataset(inputs, targets).take(torch.tensor([3])).call.args[1].tolist() == [0, 1]
    assert UnitDataset(inputs, targets, shares=False).take(torch.tensor([3])).call.args[1].tolist() == [1]


def test_rows_of_a_single_sample_are_held_out_of_those_that_count(generator):
    output = torch.arange(20.0).view(10, 2)
    importance = torch.tensor([1.0, 0.0] * 5).view(10, 1)
    inputs, targets = recorded(UnitCall((output,), {})), recorded(output)
    data = UnitDataset(inputs, targets, importance=recorded([importance]), whole=True)
    held, others = split_rows(data, 0.4, generator)
    index = torch.tensor([0])
    for _ in range(2):
        # The same ones, whenever they are drawn.
        (first,), (second,) = held.take(index).importance, others.take(index).importance
        assert int(first.sum()) == 2 and int(second.sum()) == 3
        assert torch.equal(first + second, importance)
    assert torch.equal(held.take(index).target, output)


def test_a_single_row_that_counts_serves_for_both(generator):
    output, importance = torch.ones(4, 2), torch.tensor([0.0, 1.0, 0.0, 0.0]).view(4, 1)
    inputs, targets = recorded(UnitCall((output,), {})), recorded(output)
    data = UnitDataset(inputs, targets, importance=recorded([importance]), whole=True)
    for part in split_rows(data, 0.5, generator):
        (found,) = part.take(torch.tensor([0])).importance
        assert torch.equal(found, importance)
