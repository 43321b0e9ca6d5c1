import pytest
import torch

from lightning_calibtip.calibration.replay import UnitCall
from lightning_calibtip.reconstruction.samples import UnitSamples


def test_samples_of_several_calls_become_one_and_constants_stay():
    mask = torch.ones(1, 3)
    calls = [UnitCall((torch.full((n, 2), float(n)),), {"mask": mask.clone(), "flag": True}) for n in (2, 3)]
    samples = UnitSamples.join(calls, [[torch.arange(2.0)], [torch.arange(3.0)]])
    assert samples.count == 5
    call, target = samples.take(torch.tensor([4, 0]))
    assert call.args[0].tolist() == [[3.0, 3.0], [2.0, 2.0]]
    assert torch.equal(call.kwargs["mask"], mask) and call.kwargs["flag"] is True
    assert target[0].tolist() == [2.0, 0.0]


def test_what_is_the_same_in_all_calls_is_kept_once_even_if_it_is_as_long_as_a_batch():
    mask = torch.rand(4, 4)
    calls = [UnitCall((torch.rand(4, 2),), {"mask": mask.clone()}) for _ in range(2)]
    samples = UnitSamples.join(calls, [[torch.zeros(4)], [torch.zeros(4)]])
    assert torch.equal(samples.take(torch.tensor([5]))[0].kwargs["mask"], mask)


def test_calls_of_different_shapes_stay_whole():
    calls = [UnitCall((torch.zeros(2, length),), {}) for length in (3, 5)]
    samples = UnitSamples.join(calls, [[torch.zeros(2, length)] for length in (3, 5)])
    assert samples.count == 2
    assert samples.take(torch.tensor([1]))[0].args[0].shape == (2, 5)


def test_differently_nested_calls_are_refused():
    calls = [UnitCall((torch.zeros(2),), {}), UnitCall((torch.zeros(2), torch.zeros(2)), {})]
    with pytest.raises(ValueError, match="differently nested"):
        UnitSamples.join(calls, [[torch.zeros(2)], [torch.zeros(2)]])
