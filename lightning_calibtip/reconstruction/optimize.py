"""AdaQuant on one unit: optimise weights, bias and quantization parameters so that its output matches the float one."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..calibration.magnitudes import output_magnitudes
from ..quantization.affine import SMALLEST_SCALE
from ..quantization.layers import QuantizedLayer, learning
from .samples import UnitSamples
from .settings import AdaQuantSettings
from .units import Unit

log = logging.getLogger(__name__)

# Held-out samples are measured in chunks of this many, which bounds the memory of the measurement.
_CHUNK = 64


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit; errors are relative: mean squared error over the target's mean square, on held-out
    samples.

    Args:
        name: Of the unit.
        layers: Names of its layers.
        error_before: Before its optimisation.
        error_after: Of the state that was kept, so never above ``error_before``.
        kept: Whether the optimised state was kept.
        note: Why it was not.
    """

    name: str
    layers: tuple[str, ...]
    error_before: float
    error_after: float
    kept: bool
    note: str


def output_tensors(unit: Unit, output: object) -> list[Tensor]:
    """Floating-point tensors of a unit's output, after the activation that follows."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return leaves if unit.activation is None else [unit.activation(leaf) for leaf in leaves]


def _loss(unit: Unit, samples: UnitSamples, index: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squared errors, which AdaQuant minimises, and the target's sum of squares."""
    call, targets = samples.take(index)
    outputs = output_tensors(unit, unit(call))
    error = sum(((o - t).float().square().sum() for o, t in zip(outputs, targets, strict=True)), torch.zeros(()))
    return error, sum((t.float().square().sum() for t in targets), torch.zeros(()))


@torch.no_grad()
def relative_error(unit: Unit, samples: UnitSamples, index: Tensor) -> float:
    """Relative error of the unit as it is, on the samples at ``index``."""
    sums = [_loss(unit, samples, part) for part in index.split(1 if samples.whole else _CHUNK)]
    error, power = (float(sum(column)) for column in zip(*sums, strict=True))
    return error / power if power else error


def _groups(layer: QuantizedLayer, settings: AdaQuantSettings, output_error: float) -> list[dict[str, object]]:
    """Adam's parameter groups of a layer, each with its learning rate (see ``AdaQuantSettings.relative``).

    Args:
        layer: The layer.
        settings: The rates.
        output_error: Root mean square of its unit's output error, in the unit of the layer's output.
    """

    # The scale of a dead channel is 1, whatever the others are: hence medians.
    def rate(value: float, step: float) -> float:
        return value * step if settings.relative else value

    on_weight, on_input = layer.quantizers
    groups = [([layer.weight], rate(settings.weight_rate, float(on_weight.scale.median())))]
    if layer.bias is not None:
        groups.append(([layer.bias], rate(settings.bias_rate, output_error)))
    for quantizer, value in ((on_weight, settings.weight_range_rate), (on_input, settings.input_range_rate)):
        groups.append(
            ([quantizer.scale], rate(value, float(quantizer.scale.median()) / (quantizer.qmax - quantizer.qmin)))
        )
        if not quantizer.symmetric:
            groups.append(([quantizer.zero_point], settings.zero_point_rate))
    return [{"params": params, "lr": lr, "initial_lr": lr} for params, lr in groups if lr > 0]


def optimize_unit(
    unit: Unit, samples: UnitSamples, settings: AdaQuantSettings, generator: torch.Generator
) -> UnitResult:
    """Optimise one unit in place; put it back as it was where that does not lower the error on held-out samples.

    Args:
        unit: Calibrated, quantization on.
        samples: Inputs and float targets.
        settings: See ``AdaQuantSettings``.
        generator: Draws the held-out samples and the mini-batches.

    Returns:
        The errors before and after.
    """
    order = torch.randperm(samples.count, generator=generator)
    held = min(max(1, round(settings.holdout * samples.count)), samples.count - 1)
    # With a single sample there is nothing to hold out: it serves for both.
    holdout, training = (order[:held], order[held:]) if samples.count > 1 else (order, order)
    before = relative_error(unit, samples, holdout)
    initial = [layer.save() for layer in unit.layers]
    diverged = _descend(unit, samples, settings, training, before, generator)
    after = float("nan") if diverged else relative_error(unit, samples, holdout)
    note = diverged or ("" if after < before else f"the held-out error did not fall ({before:.3g} to {after:.3g})")
    if note:
        for layer, state in zip(unit.layers, initial, strict=True):
            layer.restore(state)
        log.warning("%s: restored to its state before AdaQuant: %s.", unit.name, note)
    else:
        log.info("%s: relative error %.3g to %.3g", unit.name, before, after)
    for layer in unit.layers:
        layer.errors = (before, before if note else after)
    layers = tuple(layer.name for layer in unit.layers)
    return UnitResult(unit.name, layers, before, before if note else after, not note, note)


def _descend(
    unit: Unit,
    samples: UnitSamples,
    settings: AdaQuantSettings,
    training: Tensor,
    error_before: float,
    generator: torch.Generator,
) -> str:
    """The optimiser's steps; returns why it had to stop early, or ''."""
    call, _ = samples.take(training[: settings.batch_size])
    magnitudes = output_magnitudes(unit.layers, lambda: unit(call))
    groups = [
        group
        for layer in unit.layers
        for group in _groups(layer, settings, magnitudes.get(layer.name, 0.0) * error_before**0.5)
    ]
    if not groups:
        return ""
    optimizer = torch.optim.Adam(groups)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scales = [quantizer.scale for layer in unit.layers for quantizer in layer.quantizers]
    queue = training[:0]
    with learning(parameters):
        for step in range(settings.iterations):
            if len(queue) < min(settings.batch_size, len(training)):
                queue = torch.cat([queue, training[torch.randperm(len(training), generator=generator)]])
            index, queue = queue[: settings.batch_size], queue[settings.batch_size :]
            error, power = _loss(unit, samples, index)
            loss = error / power.clamp_min(1e-20)
            if not bool(torch.isfinite(loss)):
                return f"the error became {float(loss.detach())} at step {step}"
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * settings.rate_at(step)
            optimizer.step()
            # Autocast keeps casts of parameters, which have just changed.
            torch.clear_autocast_cache()
            with torch.no_grad():
                for scale in scales:
                    scale.clamp_min_(SMALLEST_SCALE)
    for layer in unit.layers:
        for quantizer in layer.quantizers:
            quantizer.round_zero_point()
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in parameters)
    return "" if finite else "a parameter became NaN or infinite"
