import pytest
import torch

from lightning_calibtip.reconstruction.adam import Adam


def test_steps_equal_those_of_torch(generator):
    start = [torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    rates = [1e-2, 3e-1]
    adam = Adam(ours, rates)
    reference = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(theirs, rates, strict=True)])
    for step in range(20):
        factor = 0.9**step
        gradients = [torch.randn(tensor.shape, generator=generator) for tensor in start]
        # The second parameter learns at every third step only.
        for parameters in (ours, theirs):
            parameters[0].grad = gradients[0].clone()
            parameters[1].grad = gradients[1].clone() if step % 3 == 0 else None
        for group, rate in zip(reference.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        adam.step(factor)
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert a.grad is None


def test_without_gradients_nothing_moves():
    parameter = torch.ones(3, requires_grad=True)
    Adam([parameter], [1.0]).step(1.0)
    assert parameter.tolist() == pytest.approx([1, 1, 1])
