"""Distance of a quantized model's outputs from the float model's: the unlabelled loss of tuning and allocation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.network import QuantizedNetwork
from .calibration_set import CalibrationSet, named_logits, output_logits

# How the names of outputs begin whose classes are the positions of the input.
POSITION_LOGITS = ("start", "end")


@torch.no_grad()
def float_logits(network: QuantizedNetwork, calibration: CalibrationSet) -> list[list[Tensor]]:
    """Logits of the float model: for each batch, each output tensor."""
    with network.quantized(False):
        return [[logits.detach() for logits in output_logits(calibration.run(i))] for i in range(len(calibration))]


def sample_divergences(output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
    """Divergence of each sample's quantized outputs from its float ones, in nats, summed over output tensors.

    Where an output holds logits of classes, the Kullback-Leibler divergence KL(float || quantized), averaged over
    positions; classes lie along the last dimension, or along dimension 1 of tensors with four or more (segmentation).
    Where it has one value a sample (regression, a single logit), the squared error over twice the float output's mean
    square, which is the divergence of two Gaussians of that variance.

    Tokens that do not count are left out: of the positions that are averaged over, and of the classes where these are
    the positions themselves (outputs named ``start...`` and ``end...``: of an answer).

    Args:
        output: What the quantized model returned.
        target: Float output tensors of the same batch, the samples along the first dimension.
        tokens: Which tokens count, bool, shape (samples, positions); all if None.

    Returns:
        Shape (samples,).
    """
    return sum(
        (
            _divergences(logits.float(), wanted.float(), tokens, name.startswith(POSITION_LOGITS))
            for (name, logits), wanted in zip(named_logits(output), target, strict=True)
        ),
        torch.zeros((), device=target[0].device),
    )


def _divergences(logits: Tensor, wanted: Tensor, tokens: Tensor | None, of_positions: bool) -> Tensor:
    if tokens is not None and of_positions and logits.shape == tokens.shape:
        lowest = torch.finfo(torch.float32).min
        logits, wanted = logits.masked_fill(~tokens, lowest), wanted.masked_fill(~tokens, lowest)
    axis = 1 if logits.dim() >= 4 else -1
    if logits.dim() == 1 or logits.shape[axis] == 1:
        lost = (logits - wanted).square() / (2 * wanted.square().mean().clamp_min(1e-12))
    else:
        student, teacher = F.log_softmax(logits, axis), F.log_softmax(wanted, axis)
        lost = F.kl_div(student, teacher, reduction="none", log_target=True).sum(axis)
    if tokens is not None and logits.dim() > 2 and lost.shape == tokens.shape:
        return (lost * tokens).sum(1) / tokens.sum(1).clamp_min(1)
    return lost.flatten(1).mean(1) if lost.dim() > 1 else lost


def kl_divergence(output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
    """Mean of ``sample_divergences`` over the samples."""
    return sample_divergences(output, target, tokens).mean()


@torch.no_grad()
def measure_divergences(calibration: CalibrationSet, targets: list[list[Tensor]], indices: list[int]) -> Tensor:
    """Divergences of the model as it is from ``targets``, of all samples of the batches ``indices``."""
    return torch.cat(
        [sample_divergences(calibration.run(index), targets[index], calibration.tokens(index)) for index in indices]
    )
