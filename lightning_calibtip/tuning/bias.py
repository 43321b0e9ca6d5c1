"""Bias tuning (Hubara et al. 2021): tune only biases, end to end, to the float model's logits."""

import logging
import math
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibration_set import CalibrationSet
from ..calibration.divergences import Divergence, check_divergence, divergence_of
from ..calibration.logits import measure_divergences
from ..calibration.output_rms import output_rms
from ..calibration.progress import ProgressCallback, no_progress
from ..calibration.utility import with_utility
from ..network.network import QuantizedNetwork
from ..network.trainable import trainable
from ..network.trial import falls_on_average, trial

log = logging.getLogger(__name__)

# What is greater does not fit the arithmetic of Adam; this is more than enough to ruin a model, which is put back then.
_GREATEST_RATE = 1e30

_NOTHING_TO_TUNE = "no layer has a bias"


@dataclass(frozen=True)
class BiasTuningOptions:
    """Options of bias tuning.

    Args:
        epochs: Passes over the calibration set, at least 1.
        rate: Adam's learning rate of biases, as a fraction of the root mean square of each layer's output.
        scale_rate: Learning rate of the scales of weights and activations, as a fraction of each tensor's median scale;
            0 leaves scales alone.
        holdout: Share of the batches that is not tuned on and decides whether the result is kept, at least 0 and below
            1.
        seed: Random seed of the order of batches and of the choice of held-out ones.
        divergence: What is minimised: ``"kl"`` from the float logits, ``"mse"`` of the outputs, KL and what mistakes
            cost (a ``Utility``, or a mapping of its fields), or another ``Divergence`` or its name.

    Raises:
        ValueError: If an option is out of its range; the message names it, its value and the allowed range.

    Example:
        >>> BiasTuningOptions(epochs=2).rate
        0.001
    """

    epochs: int = 4
    rate: float = 1e-3
    scale_rate: float = 0.0
    holdout: float = 0.25
    seed: int = 0
    divergence: Divergence | Mapping[str, Any] | str = "kl"

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"epochs must be an integer of at least 1, got {self.epochs!r}.")
        for name in ("rate", "scale_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be at least 0 and below 1, got {self.holdout}.")
        object.__setattr__(self, "divergence", with_utility(self.divergence, "divergence"))
        check_divergence(self.divergence, "divergence")


@dataclass(frozen=True)
class BiasTuningResult:
    """Outcome of bias tuning.

    Args:
        divergence_before: Divergence from the float model on held-out batches before, for KL in nats a sample; NaN
            where there was nothing to tune.
        divergence_after: The same of the state that was kept.
        kept: Whether the tuned state was kept.
        note: Why it was not; ``""`` if it was.

    Example:
        See ``tune_bias``.
    """

    divergence_before: float
    divergence_after: float
    kept: bool
    note: str = ""


def tune_bias(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: BiasTuningOptions | None = None,
    progress: ProgressCallback = no_progress,
) -> BiasTuningResult:
    """Tune the biases (and scales, if asked) of the quantized layers in place; put them back where that does not help.

    The result is kept if the divergence of the held-out samples falls by more than the standard error of that fall; if
    it has not fallen at all after the first epoch, the others are left out.
    Without biases (and scales) to tune nothing is measured.

    Args:
        network: Calibrated network.
        calibration: Calibration set; with a single batch, that one also decides.
        options: See ``BiasTuningOptions``.
        progress: Progress callback, called for each batch with its divergence.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
        TypeError: If the model's output holds no logits.
        ValueError: If these do not fit the divergence.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval().requires_grad_(False)
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(8, 2))
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=2, edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> result = tune_bias(network, calibration, BiasTuningOptions(epochs=1))
        >>> result.divergence_after <= result.divergence_before
        True
    """
    if not network.calibrated:
        raise RuntimeError("Bias tuning starts from a quantized model: run Calibration first.")
    calibration.require()
    options = options or BiasTuningOptions()
    if options.scale_rate == 0 and all(layer.bias is None for layer in network.layers.values()):
        return BiasTuningResult(math.nan, math.nan, False, _NOTHING_TO_TUNE)
    divergence = divergence_of(options.divergence)
    targets = divergence.targets(network, calibration)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(calibration), generator=generator).tolist()
    held = min(math.ceil(options.holdout * len(order)), len(order) - 1)
    training = order[held:]
    judging = order[:held] or training
    measure = partial(measure_divergences, calibration, targets, judging, None, divergence.training_loss)
    given_up: Tensor | None = None
    with trial(network.layers.values(), measure, falls_beyond_chance) as attempt:
        groups = _groups(network, calibration, options, training[0])
        steps = _descend(network, calibration, options, targets, training, groups, generator, progress)
        with closing(steps):
            for epoch in steps if groups else ():
                # What has not begun to help by then will not help by more than chance.
                if epoch == 1 and options.epochs > 1 and not falls_on_average(attempt.before, tried := measure()):
                    given_up = tried
                    attempt.fail("no fall in the first epoch")
                    break
        if not groups:
            attempt.fail(_NOTHING_TO_TUNE)
    before, after = float(attempt.before.mean()), float(attempt.after.mean())
    note = attempt.note
    if groups and not attempt.kept:
        losses = attempt.tried if given_up is None else given_up
        when = "" if given_up is None else " in the first epoch"
        note = f"it did not surely lower the held-out divergence{when} ({before:.4g} to {float(losses.mean()):.4g})"
        log.warning("Bias tuning: biases restored, since %s.", note)
    return BiasTuningResult(before, after, attempt.kept, note)


def _descend(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: BiasTuningOptions,
    targets: list[list[Tensor]],
    training: list[int],
    groups: list[dict[str, object]],
    generator: torch.Generator,
    progress: ProgressCallback,
) -> Generator[int, None, None]:
    """Take all steps of the optimiser; yields the number of epochs done after each epoch."""
    optimizer = torch.optim.Adam(groups)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    quantizers = network.quantizers
    divergence, total = divergence_of(options.divergence), options.epochs * len(training)
    with trainable(parameters):
        for step in range(total):
            if step % len(training) == 0:
                shuffled = torch.randperm(len(training), generator=generator).tolist()
            index = training[shuffled[step % len(training)]]
            optimizer.zero_grad(set_to_none=True)
            of_samples = divergence.training_loss(calibration.run(index), targets[index], calibration.tokens(index))
            lost = of_samples.mean()
            lost.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.step()
            progress(step + 1, total, f"epoch {step // len(training)}: divergence {float(lost.detach()):.3g}")
            for quantizer in quantizers:
                quantizer.clamp_()
            # Autocast keeps casts of parameters: these have just changed, and are then used without gradients.
            torch.clear_autocast_cache()
            if (step + 1) % len(training) == 0:
                yield (step + 1) // len(training)
                torch.clear_autocast_cache()
    for quantizer in quantizers:
        quantizer.finalize_()


def falls_beyond_chance(before: Tensor, after: Tensor) -> bool:
    """Whether the mean gain is above its standard error: a few unlucky samples can hide that there is none.

    Args:
        before: Loss of each sample before, shape (n,).
        after: Loss of each sample afterwards, shape (n,).

    Example:
        >>> falls_beyond_chance(torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.8]))
        True
        >>> falls_beyond_chance(torch.tensor([1.0, 1.0]), torch.tensor([0.2, 1.6]))
        False
    """
    gain = before - after
    error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else torch.zeros(())
    return bool(gain.mean() > error)


def _groups(
    network: QuantizedNetwork, calibration: CalibrationSet, options: BiasTuningOptions, batch: int
) -> list[dict[str, object]]:
    layers, tokens = network.layers.values(), calibration.tokens(batch)
    rms = output_rms(layers, lambda: calibration.run(batch), tokens)
    groups: list[tuple[list[Tensor], float]] = []
    seen = set()
    for name, layer in network.layers.items():
        if layer.bias is not None:
            groups.append(([layer.bias], options.rate * rms.get(name, 0.0)))
        for quantizer in layer.quantizers:
            scales = [t.parameter for t in quantizer.trainables() if t.role == "scale"]
            if scales and quantizer not in seen:
                groups.append((scales, options.scale_rate * quantizer.step_size()))
            seen.add(quantizer)
    rates = [(params, min(rate, _GREATEST_RATE)) for params, rate in groups if rate > 0]
    return [{"params": params, "lr": rate, "initial_lr": rate} for params, rate in rates]
