"""Distance of a quantized model's logits from the float model's, the unlabelled loss of tuning and of bit
allocation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.network import QuantizedNetwork
from .calibration_set import CalibrationSet, output_logits


@torch.no_grad()
def float_logits(network: QuantizedNetwork, calibration: CalibrationSet) -> list[list[Tensor]]:
    """Logits of the float model: for each batch, each output tensor."""
    with network.quantized(False):
        return [[logits.detach() for logits in output_logits(calibration.run(i))] for i in range(len(calibration))]


def kl_divergence(output: Any, target: list[Tensor]) -> Tensor:
    """Mean over samples of the divergence of quantized outputs from float ones, in nats, summed over output tensors.

    Where an output holds logits of classes, the Kullback-Leibler divergence KL(float || quantized), averaged over
    positions; classes lie along the last dimension, or along dimension 1 of tensors with four or more (segmentation).
    Where it has one value a sample (regression, a single logit), the squared error over twice the float output's mean
    square, which is the divergence of two Gaussians of that variance.

    Args:
        output: What the quantized model returned.
        target: Float output tensors of the same batch.
    """
    total = torch.zeros(())
    for logits, wanted in zip(output_logits(output), target, strict=True):
        total = total.to(logits.device) + _divergence(logits.float(), wanted.float())
    return total


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    axis = 1 if logits.dim() >= 4 else -1
    if logits.dim() == 1 or logits.shape[axis] == 1:
        return (logits - wanted).square().mean() / (2 * wanted.square().mean().clamp_min(1e-12))
    student = F.log_softmax(logits, axis).movedim(axis, -1).flatten(0, -2)
    teacher = F.log_softmax(wanted, axis).movedim(axis, -1).flatten(0, -2)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@torch.no_grad()
def mean_divergence(calibration: CalibrationSet, targets: list[list[Tensor]], indices: list[int]) -> float:
    """KL divergence of the model as it is from ``targets``, averaged over the samples of the batches ``indices``."""
    sums, counts = 0.0, 0
    for index in indices:
        count = targets[index][0].shape[0]
        sums += float(kl_divergence(calibration.run(index), targets[index])) * count
        counts += count
    return sums / counts
