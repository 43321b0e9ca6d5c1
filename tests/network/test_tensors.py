import pytest
import torch

from lightning_calibtip.network.tensors import ObservedTensor
from lightning_calibtip.quantization.observers import MinMaxObserver, MovingAverageObserver
from lightning_calibtip.quantization.spec import TensorSpec

TOKENS = torch.tensor([[True, True, True, False], [True, False, False, False]])


def test_only_tokens_that_count_are_observed():
    tensor = ObservedTensor("x", token_axes=(2,), observer=MinMaxObserver())
    x = torch.where(TOKENS[:, None, :, None], torch.linspace(-1, 2, 48).view(2, 2, 4, 3), torch.tensor(99.0))
    tensor.observe(x, TOKENS)
    low, high = tensor.observer.compute_range(TensorSpec(8))
    inside = x[x < 99]
    assert (float(low), float(high)) == (float(inside.min()), float(inside.max()))


def test_the_very_same_value_counts_once_and_a_changed_one_again():
    tensor = ObservedTensor("x", readers=["a", "b"], observer=MovingAverageObserver())
    x = torch.randn(4)
    tensor.observe(x, None)
    tensor.observe(x, None)
    tensor.observe(x.view(4), None)
    assert tensor.observer.update_count == 1
    x.mul_(2)
    tensor.observe(x, None)
    tensor.observe(x.clone(), None)
    assert tensor.observer.update_count == 3
    tensor.next_batch()
    tensor.observe(x, None)
    assert tensor.observer.update_count == 4


def test_each_format_has_one_quantizer_with_the_calibrated_range():
    tensor = ObservedTensor("x", observer=MinMaxObserver())
    before = tensor.quantizer(TensorSpec(8), torch.device("cpu"))
    tensor.observe(torch.tensor([0.0, 15.0]), None)
    four = tensor.quantizer(TensorSpec(4), torch.device("cpu"))
    assert four.scale.item() == 1.0 and before.scale.item() == 1.0
    tensor.fit_range(TensorSpec(8))
    assert before.scale.item() == pytest.approx(15 / 255)
    assert tensor.quantizer(TensorSpec(8), torch.device("cpu")) is before


def test_a_range_without_an_observer_is_an_error_that_names_the_tensor():
    tensor = ObservedTensor("fc input")
    tensor.quantizer(TensorSpec(8), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="fc input: no calibration batch has reached this tensor"):
        tensor.fit_range(TensorSpec(8))
