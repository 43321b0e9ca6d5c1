"""Bias tuning (Hubara et al. 2021): tune only biases, end to end, to the float model's logits."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.calibration_set import CalibrationSet
from ..calibration.logits import float_logits, kl_divergence, measure_divergences
from ..calibration.magnitudes import output_magnitudes
from ..calibration.steps import Steps, untold
from ..quantization.affine import SMALLEST_SCALE
from ..quantization.layers import learning
from ..quantization.network import QuantizedNetwork

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BiasTuningSettings:
    """How biases are tuned.

    Args:
        epochs: Passes over the calibration set, at least 1.
        rate: Adam's learning rate, as a fraction of the root mean square of each layer's output.
        scale_rate: Learning rate of the scales of weights and inputs, as a fraction of each tensor's median scale; 0
            leaves scales alone.
        holdout: Share of the batches that is not tuned on and decides whether the result is kept, at least 0 and below
            1.
        seed: Of the order of batches and of the choice of held-out ones.

    Raises:
        ValueError: naming the setting, its value and the allowed range.
    """

    epochs: int = 4
    rate: float = 1e-3
    scale_rate: float = 0.0
    holdout: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}.")
        for name in ("rate", "scale_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be at least 0 and below 1, got {self.holdout}.")


@dataclass(frozen=True)
class BiasTuningResult:
    """KL divergence (nats a sample) on held-out batches before and after, and whether the tuned state was kept."""

    divergence_before: float
    divergence_after: float
    kept: bool


def tune_bias(
    network: QuantizedNetwork, calibration: CalibrationSet, settings: BiasTuningSettings, steps: Steps = untold
) -> BiasTuningResult:
    """Tune the biases (and scales, if asked) of the quantized layers in place; put them back where that does not help.

    The result is kept if the divergence of the held-out samples falls by more than the standard error of that fall.

    Args:
        network: Calibrated.
        calibration: The samples; with a single batch, that one also decides.
        settings: See ``BiasTuningSettings``.
        steps: Told of each batch, with its divergence.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
        TypeError: If the model's output holds no logits.
    """
    if not network.calibrated:
        raise RuntimeError("Bias tuning starts from a quantized model: run Calibration first.")
    calibration.require()
    targets = float_logits(network, calibration)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(calibration), generator=generator).tolist()
    held = min(math.ceil(settings.holdout * len(order)), len(order) - 1)
    training = order[held:]
    judging = order[:held] or training
    before = measure_divergences(calibration, targets, judging)
    initial = {name: layer.save() for name, layer in network.layers.items()}
    groups = _groups(network, calibration, settings, training[0])
    if not groups:
        return BiasTuningResult(float(before.mean()), float(before.mean()), False)
    optimizer = torch.optim.Adam(groups)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scales = [quantizer.scale for layer in network.layers.values() for quantizer in layer.quantizers]
    total = settings.epochs * len(training)
    with learning(parameters):
        for step in range(total):
            if step % len(training) == 0:
                shuffled = torch.randperm(len(training), generator=generator).tolist()
            index = training[shuffled[step % len(training)]]
            optimizer.zero_grad(set_to_none=True)
            divergence = kl_divergence(calibration.run(index), targets[index], calibration.tokens(index))
            divergence.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.step()
            steps(step + 1, total, f"epoch {step // len(training)}: KL divergence {float(divergence.detach()):.3g}")
            # Autocast keeps casts of parameters, which have just changed.
            torch.clear_autocast_cache()
            with torch.no_grad():
                for scale in scales:
                    scale.clamp_min_(SMALLEST_SCALE)
    after = measure_divergences(calibration, targets, judging)
    kept = _is_better(before, after)
    if not kept:
        for name, state in initial.items():
            network.layers[name].restore(state)
        log.warning(
            "Bias tuning did not surely lower the held-out divergence (%.4g to %.4g): biases restored.",
            before.mean(),
            after.mean(),
        )
    return BiasTuningResult(float(before.mean()), float((after if kept else before).mean()), kept)


def _is_better(before: Tensor, after: Tensor) -> bool:
    """Whether the mean gain is above its standard error: a few unlucky samples can hide that there is none."""
    gain = before - after
    error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else torch.zeros(())
    return bool(gain.mean() > error)


def _groups(
    network: QuantizedNetwork, calibration: CalibrationSet, settings: BiasTuningSettings, batch: int
) -> list[dict[str, object]]:
    layers, tokens = network.layers.values(), calibration.tokens(batch)
    magnitudes = output_magnitudes(layers, lambda: calibration.run(batch), tokens)
    groups = []
    for name, layer in network.layers.items():
        if layer.bias is not None:
            groups.append(([layer.bias], settings.rate * magnitudes.get(name, 0.0)))
        for quantizer in layer.quantizers:
            groups.append(([quantizer.scale], settings.scale_rate * float(quantizer.scale.median())))
    return [{"params": params, "lr": rate, "initial_lr": rate} for params, rate in groups if rate > 0]
