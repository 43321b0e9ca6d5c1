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
    """Logits of the float model: for each batch, each output tensor (classes along its last dimension)."""
    with network.quantized(False):
        return [[logits.detach() for logits in output_logits(calibration.run(i))] for i in range(len(calibration))]


def kl_divergence(output: Any, target: list[Tensor]) -> Tensor:
    """Mean over samples of the Kullback-Leibler divergence KL(float || quantized) in nats, summed over output tensors.

    Args:
        output: What the quantized model returned.
        target: Float logits of the same batch.
    """
    total = torch.zeros(())
    for logits, wanted in zip(output_logits(output), target, strict=True):
        student = F.log_softmax(logits.float(), -1).flatten(0, -2)
        teacher = F.log_softmax(wanted.float(), -1).flatten(0, -2)
        total = total.to(logits.device) + F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return total


@torch.no_grad()
def mean_divergence(calibration: CalibrationSet, targets: list[list[Tensor]], indices: list[int]) -> float:
    """KL divergence of the model as it is from ``targets``, averaged over the samples of the batches ``indices``."""
    sums, counts = 0.0, 0
    for index in indices:
        count = targets[index][0].shape[0]
        sums += float(kl_divergence(calibration.run(index), targets[index])) * count
        counts += count
    return sums / counts
