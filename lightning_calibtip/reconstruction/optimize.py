"""AdaQuant on one unit: optimise weights, bias and quantization parameters so that its output matches the float one."""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..calibration.magnitudes import output_magnitudes
from ..calibration.replay import UnitCall
from ..calibration.steps import Steps, untold
from ..quantization.affine import SMALLEST_SCALE, dot
from ..quantization.layers import QuantizedLayer, learning
from .adam import Adam
from .dropping import Dropping, dropping
from .rounding import LearnedRounding, learned_rounding, undecided
from .samples import Draw, UnitSamples
from .settings import AdaQuantSettings
from .units import Unit

log = logging.getLogger(__name__)

# Held-out samples are measured in chunks of this many, which bounds the memory of the measurement.
_CHUNK = 32

# Whether the error is still finite is looked at every so many steps: each look waits for the device.
_LOOK_EVERY = 25


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
        seconds: Spent in the optimiser's steps.
    """

    name: str
    layers: tuple[str, ...]
    error_before: float
    error_after: float
    kept: bool
    note: str
    seconds: float


def output_tensors(unit: Unit, output: object) -> list[Tensor]:
    """Floating-point tensors of a unit's output, after the activation that follows."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return leaves if unit.activation is None else [unit.activation(leaf) for leaf in leaves]


def _squared_error(unit: Unit, draw: Draw, call: UnitCall) -> Tensor:
    """Sum of squared errors, each times its importance: what AdaQuant minimises."""
    # The targets are the draw's own.
    outputs, targets = output_tensors(unit, unit(call)), output_tensors(unit, draw.target)
    pairs = list(zip(outputs, targets, strict=True))
    importance = draw.importance or cycle([None])
    return sum((_SquaredError.apply(o, t, w) for (o, t), w in zip(pairs, importance, strict=False)), torch.zeros(()))


class _SquaredError(torch.autograd.Function):
    """Sum of weighted squared differences, without memory of its own: the target's is used up."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, importance: Tensor | None) -> Tensor:
        difference = target.sub_(output) if target.dtype == torch.float32 else target.float().sub_(output)
        weighted = difference if importance is None else difference * importance
        ctx.save_for_backward(weighted)
        ctx.dtype = output.dtype
        return dot(weighted, difference)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weighted,) = ctx.saved_tensors
        return weighted.mul_(-2 * grad).to(ctx.dtype), None, None


def _power(unit: Unit, draw: Draw) -> Tensor:
    """What an output of zeros would have as its error."""
    targets = output_tensors(unit, draw.target)
    importance = draw.importance or cycle([torch.ones(())])
    pairs = zip(targets, importance, strict=False)
    return sum(((t.float().square() * w.to(t.device)).sum() for t, w in pairs), torch.zeros(()))


@torch.no_grad()
def relative_error(unit: Unit, samples: UnitSamples, index: Tensor) -> float:
    """Relative error of the unit as it is, on the samples at ``index``."""
    error = power = 0.0
    for part in index.split(1 if samples.whole else _CHUNK):
        draw = samples.take(part)
        power += float(_power(unit, draw))
        error += float(_squared_error(unit, draw, draw.call))
    return error / power if power else error


class _Rate(NamedTuple):
    """Learning rate of a parameter; a ``sparse`` one learns at some steps only."""

    parameter: Tensor
    value: float
    sparse: bool


def _rates(
    layer: QuantizedLayer, rounding: LearnedRounding | None, settings: AdaQuantSettings, output_error: float
) -> list[_Rate]:
    """What is learned of a layer, and how fast (see ``AdaQuantSettings.relative``).

    Args:
        layer: The layer.
        rounding: Of its weight, where that is learned.
        settings: The rates.
        output_error: Root mean square of its unit's output error, in the unit of the layer's output.
    """
    relative = settings.relative
    rates = []
    if layer.bias is not None:
        rates.append(_Rate(layer.bias, settings.bias_rate * (output_error if relative else 1), False))
    on_weight = layer.weight_quantizer
    if rounding is not None:
        rates.append(_Rate(rounding.variable, settings.rounding_rate, False))
    elif on_weight is not None:
        # The scale of a dead channel is 1, whatever the others are: hence medians.
        step = float(on_weight.scale.median()) if relative else 1.0
        rates.append(_Rate(layer.weight, settings.weight_rate * step, False))
    for quantizer in layer.quantizers:
        if quantizer.dynamic:
            continue
        sparse = quantizer is not on_weight
        # This moves the end of the range by one step.
        step = float(quantizer.scale.median()) / (quantizer.qmax - quantizer.qmin) if relative else 1.0
        rate = settings.input_range_rate if sparse else settings.weight_range_rate
        rates.append(_Rate(quantizer.scale, rate * step, sparse))
        if quantizer.learns_zero_point and (sparse or rounding is None):
            rates.append(_Rate(quantizer.zero_point, settings.zero_point_rate, sparse))
    return [rate for rate in rates if rate.value > 0]


def optimize_unit(unit: Unit, samples: UnitSamples, settings: AdaQuantSettings, steps: Steps = untold) -> UnitResult:
    """Optimise one unit in place; put it back as it was where that does not lower the error on held-out samples.

    Args:
        unit: Calibrated, quantization on.
        samples: Inputs and float targets.
        settings: See ``AdaQuantSettings``. What is drawn depends on their seed and the unit's name alone.
        steps: Told now and then, with the mini-batch's relative error.

    Returns:
        The errors before and after.
    """
    digest = hashlib.sha256(f"{settings.seed} {unit.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    order = torch.randperm(samples.count, generator=generator)
    held = min(max(1, round(settings.holdout * samples.count)), samples.count - 1)
    # With a single sample there is nothing to hold out: it serves for both.
    holdout, training = (order[:held], order[held:]) if samples.count > 1 else (order, order)
    before = relative_error(unit, samples, holdout)
    initial = [layer.save() for layer in unit.layers]
    started = time.monotonic()
    try:
        diverged = _descend(unit, samples, settings, training, before, generator, steps)
    except BaseException:
        for layer, state in zip(unit.layers, initial, strict=True):
            layer.restore(state)
        raise
    seconds = time.monotonic() - started
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
    return UnitResult(unit.name, layers, before, before if note else after, not note, note, seconds)


def _descend(
    unit: Unit,
    samples: UnitSamples,
    settings: AdaQuantSettings,
    training: Tensor,
    error_before: float,
    generator: torch.Generator,
    steps: Steps,
) -> str:
    """The optimiser's steps; returns why it had to stop early, or ''."""
    draw = samples.take(training[: settings.batch_size])
    magnitudes = output_magnitudes(unit.layers, lambda: unit(draw.call))
    # An error of 1 before the first step: then settings mean the same for every unit.
    unit_error = max(error_before * float(_power(unit, draw)), 1e-20)
    drops = Dropping(settings.drop_probability, generator)
    scales = [quantizer.scale for layer in unit.layers for quantizer in layer.quantizers]
    with ExitStack() as stack:
        stack.enter_context(dropping(unit.layers, drops))
        roundings: Sequence[LearnedRounding] = ()
        owning = [layer for layer in unit.layers if layer.weight_quantizer is not None]
        if settings.rounding == "learned":
            roundings = stack.enter_context(learned_rounding(owning))
        rounding_of = {layer.name: rounding for layer, rounding in zip(owning, roundings, strict=False)}
        rates = [
            rate
            for layer in unit.layers
            for rate in _rates(
                layer, rounding_of.get(layer.name), settings, magnitudes.get(layer.name, 0.0) * error_before**0.5
            )
        ]
        if not rates:
            return ""
        interval = 1 if all(rate.sparse for rate in rates) else settings.input_range_interval
        parameters, sparse = [rate.parameter for rate in rates], [rate.parameter for rate in rates if rate.sparse]
        optimizer = Adam(parameters, [rate.value * (interval if rate.sparse else 1) for rate in rates])
        stack.enter_context(learning(parameters))
        for step, index in enumerate(_mini_batches(training, settings, generator)):
            for parameter in sparse:
                parameter.requires_grad_(step % interval == 0)
            draw = samples.take(index)
            loss = _squared_error(unit, draw, drops.mix(draw.call, draw.float_call)) / unit_error
            penalty = undecided(roundings, step / settings.iterations) if roundings else None
            if penalty is not None:
                loss = loss + settings.rounding_strength * penalty
            if step % _LOOK_EVERY == 0:
                if not bool(torch.isfinite(loss)):
                    return f"the error became {float(loss.detach())} at step {step}"
                error = error_before * float(loss.detach())
                steps(step, settings.iterations, f"{unit.name}: relative error {error:.3g}")
            loss.backward(inputs=[parameter for parameter in parameters if parameter.requires_grad])
            optimizer.step(settings.rate_at(step))
            # Autocast keeps casts of parameters, which have just changed.
            torch.clear_autocast_cache()
            with torch.no_grad():
                torch._foreach_clamp_min_(scales, SMALLEST_SCALE)
    for layer in unit.layers:
        for quantizer in layer.quantizers:
            quantizer.round_zero_point()
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in parameters)
    return "" if finite else "a parameter became NaN or infinite"


def _mini_batches(training: Tensor, settings: AdaQuantSettings, generator: torch.Generator) -> Iterator[Tensor]:
    """As many mini-batches as there are steps, in epochs of another order each."""
    queue = training[:0]
    for _ in range(settings.iterations):
        if len(queue) < min(settings.batch_size, len(training)):
            queue = torch.cat([queue, training[torch.randperm(len(training), generator=generator)]])
        yield queue[: settings.batch_size]
        queue = queue[settings.batch_size :]
