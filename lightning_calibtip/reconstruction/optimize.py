"""AdaQuant on one unit: optimise weights, bias and quantization parameters so that its output matches the float one."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from .. import ranks
from ..batches import is_finite
from ..calibration.output_rms import output_rms
from ..calibration.progress import ProgressCallback, no_progress
from ..calibration.recording import UnitCall
from ..network.layers import QuantizedLayer
from ..network.protection import protecting
from ..network.states import LayerState
from ..network.trainable import trainable
from ..network.trial import Trial, trial
from ..quantization.affine import SMALLEST_SCALE
from ..quantization.affine_quantizer import SMALLEST_RATIO, AffineQuantizer
from ..quantization.quantizers import Quantizer
from .adam import Adam
from .data_parallel import average_gradients, share_of_this_rank
from .dropping import Dropping, dropping
from .feedback import FEEDBACK, round_unit
from .learned_ratios import give_ratios, weights_following
from .objectives import Objective, make_objective
from .options import AdaQuantOptions
from .rates import learning_rates
from .rounding import RoundingPenalty, rounding_method
from .unit_data import MiniBatch, UnitDataset, split_rows
from .units import Unit

log = logging.getLogger(__name__)

# Held-out samples are measured in chunks of this many, which bounds the memory of the measurement.
_CHUNK = 32

# Samples whose inputs decide how weights are rounded with feedback.
_FEEDBACK_SAMPLES = 256

# Of the interpolations between the states before and after the optimiser's steps, where 1 is after, the best is kept.
_INTERPOLATIONS = (1.0, 0.75, 0.5, 0.25)

# The error is checked for NaN and infinity at every N-th step only, because each look waits for the device.
_LOOK_EVERY = 25


@dataclass(frozen=True)
class UnitResult:
    """Outcome of the reconstruction of one unit.

    Errors are relative and measured on held-out samples: for the squared error, the mean squared error over the
    target's mean square.

    Args:
        name: Name of the unit.
        layers: Names of its layers.
        error_before: Error before its optimisation.
        error_after: Error of the state that was kept, so never above ``error_before``.
        kept: Whether the optimised state was kept.
        note: Why it was not kept; ``""`` if it was.
        seconds: Time spent in the optimiser's steps.

    Example:
        >>> UnitResult("conv1", ("conv1",), 0.2, 0.1, True, "", 1.5).kept
        True
    """

    name: str
    layers: tuple[str, ...]
    error_before: float
    error_after: float
    kept: bool
    note: str
    seconds: float


def _loss(unit: Unit, objectives: Sequence[Objective], batch: MiniBatch, call: UnitCall) -> Tensor:
    """Sum of the objectives' losses over the output tensors; uses the targets of the mini-batch up."""
    outputs, targets = unit.output_tensors(unit(call)), unit.output_tensors(batch.target)
    weights = batch.importance or cycle([None])
    pairs = list(zip(outputs, targets, strict=True))
    losses = (
        objective.loss(output, target, weight)
        for (output, target), weight in zip(pairs, weights, strict=False)
        for objective in objectives
    )
    return sum((loss for loss in losses if loss is not None), torch.zeros(()))


def _power(unit: Unit, objectives: Sequence[Objective], batch: MiniBatch) -> Tensor:
    """Loss of an output of zeros."""
    weights = batch.importance or cycle([None])
    powers = (
        objective.power(target, weight)
        for target, weight in zip(unit.output_tensors(batch.target), weights, strict=False)
        for objective in objectives
    )
    return sum((power for power in powers if power is not None), torch.zeros(()))


@torch.no_grad()
def relative_error(unit: Unit, objectives: Sequence[Objective], dataset: UnitDataset, index: Tensor) -> float:
    """Relative error of a unit as it is now.

    Args:
        unit: The unit.
        objectives: What is measured.
        dataset: Samples of the unit.
        index: Positions of the samples to measure on, int64, shape (n,).

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.calibration.activation_store import ActivationStore
        >>> from lightning_calibtip.calibration.recording import Recording
        >>> from lightning_calibtip.reconstruction.objectives import SquaredError
        >>> inputs, targets = (Recording(ActivationStore(), 1) for _ in range(2))
        >>> inputs.append(UnitCall((torch.ones(2, 1),), {}))
        >>> targets.append(torch.full((2, 1), 2.0))
        >>> unit = Unit("identity", nn.Identity(), (), None)
        >>> relative_error(unit, [SquaredError()], UnitDataset(inputs, targets), torch.arange(2))
        0.25
    """
    chunks = index.split(1 if dataset.whole else _CHUNK)
    return mean_error(unit, objectives, (dataset.take(part) for part in chunks))


@torch.no_grad()
def mean_error(unit: Unit, objectives: Sequence[Objective], batches: Iterable[MiniBatch]) -> float:
    """Relative error of a unit as it is now, over mini-batches. See ``relative_error``."""
    error = power = 0.0
    for batch in batches:
        power += float(_power(unit, objectives, batch))
        error += float(_loss(unit, objectives, batch, batch.call))
    return error / power if power else error


def optimize_unit(
    unit: Unit,
    dataset: UnitDataset,
    options: AdaQuantOptions,
    fixed: AbstractSet[Quantizer] = frozenset(),
    progress: ProgressCallback = no_progress,
) -> UnitResult:
    """Optimise one unit in place; put it back as it was where that does not lower the error on held-out samples.

    Args:
        unit: Calibrated unit, quantization on.
        dataset: Inputs and float targets.
        options: See ``AdaQuantOptions``. What is drawn depends on the seed and the unit's name alone.
        fixed: Quantizers of the unit that must not change.
        progress: Called every so often, with the mini-batch's relative error.

    Returns:
        The errors before and after.

    Example:
        See ``adaquant``, which calls it for every unit.
    """
    digest = hashlib.sha256(f"{options.seed} {unit.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    order = torch.randperm(dataset.count, generator=generator)
    held = min(max(1, round(options.holdout * dataset.count)), dataset.count - 1)
    # Of a single sample, such as a graph, some rows are held out.
    holdout, training = (order[:held], order[held:]) if dataset.count > 1 else (order, order)
    judged, learned = (dataset, dataset) if dataset.count > 1 else split_rows(dataset, options.holdout, generator)
    objective = make_objective(options.objective_in_use, unit.layers)
    judge = partial(relative_error, unit, [objective], judged, holdout)
    descent = _Descent(unit, learned, options, objective, fixed, generator, progress)
    with trial(unit.layers, judge) as attempt:
        started = time.monotonic()
        if options.ratio_rate > 0:
            give_ratios([layer for layer in unit.layers if _follows_ratios(layer, options)], fixed)
        first = [layer.save() for layer in unit.layers]
        if reason := descent.run(training, float(attempt.before)):
            attempt.fail(reason)
        else:
            _interpolate(unit, first, judge)
        seconds = time.monotonic() - started
    return _conclude(unit, attempt, reason, seconds)


def _follows_ratios(layer: QuantizedLayer, options: AdaQuantOptions) -> bool:
    """Whether the layer's weight may be multiplied by ratios of the input's channels while these learn."""
    return layer.weight_quantizer is None or rounding_method(options.rounding).learns_ratios


@torch.no_grad()
def _interpolate(unit: Unit, first: Sequence[LayerState], judge: Callable[[], float]) -> None:
    """Leave a unit at the interpolation between its first and its present states that has the least held-out error:
    with few samples or rough steps, less of the way generalises better."""
    last = [layer.save() for layer in unit.layers]

    def error(weight: float) -> float:
        _restore(unit, first, last, weight)
        found = judge()
        return found if math.isfinite(found) else math.inf

    # Of equal ones the whole way.
    _restore(unit, first, last, min(_INTERPOLATIONS, key=error))


def _restore(unit: Unit, first: Sequence[LayerState], last: Sequence[LayerState], weight: float) -> None:
    for layer, start, end in zip(unit.layers, first, last, strict=True):
        layer.restore(end if weight == 1 else start.lerp(end, weight))
        for quantizer in layer.quantizers:
            quantizer.finalize_()
    # Autocast keeps casts of parameters, which have just changed.
    torch.clear_autocast_cache()


def _conclude(unit: Unit, attempt: Trial, reason: str, seconds: float) -> UnitResult:
    """Log and note what came of a trial that may have failed for a ``reason``."""
    before, tried, after = (float(errors) for errors in (attempt.before, attempt.tried, attempt.after))
    note = ""
    if not attempt.kept:
        note = reason or f"the held-out error did not fall ({before:.3g} to {tried:.3g})"
        log.warning("%s: restored to its state before AdaQuant: %s.", unit.name, note)
    else:
        log.info("%s: relative error %.3g to %.3g", unit.name, before, after)
    for layer in unit.layers:
        layer.errors = (before, after)
    return UnitResult(unit.name, tuple(layer.name for layer in unit.layers), before, after, attempt.kept, note, seconds)


@dataclass
class _Descent:
    """The optimiser's steps on one unit, see ``optimize_unit``."""

    unit: Unit
    dataset: UnitDataset
    options: AdaQuantOptions
    objective: Objective
    fixed: AbstractSet[Quantizer]
    generator: torch.Generator
    progress: ProgressCallback

    def run(self, training: Tensor, error_before: float) -> str:
        """Take all steps; returns why it had to stop early, or ``""``.

        Args:
            training: Positions of the samples to optimise on.
            error_before: Relative error before the first step.
        """
        options, unit, objective = self.options, self.unit, self.objective
        make_rounding = rounding_method(options.rounding)
        if (make_rounding.start or options.start) == FEEDBACK:
            round_unit(unit, lambda: self._samples(training))
        batch = self.dataset.take(training[: options.batch_size])
        rms = output_rms(unit.layers, lambda: unit(batch.call))
        # An error of 1 before the first step: then options mean the same for every unit.
        unit_error = max(error_before * float(_power(unit, [objective], batch)), 1e-20)
        drops = Dropping(options.drop_probability, self.generator)
        learned = self._learned_quantizers()
        clamp = clamping([quantizer for quantizers in learned.values() for quantizer in quantizers])
        with ExitStack() as stack:
            stack.enter_context(dropping(unit.layers, drops))
            stack.enter_context(protecting(unit.module, unit.layers, options.protection, self.generator))
            roundings = {layer.name: make_rounding(layer) for layer in unit.layers if layer.weight_quantizer}
            for rounding in roundings.values():
                stack.enter_context(rounding.acting())
            following = self._following(learned)
            stack.enter_context(weights_following(following))
            rates = [
                rate
                for layer in unit.layers
                for rate in learning_rates(
                    layer,
                    roundings.get(layer.name),
                    learned[layer.name],
                    options,
                    rms.get(layer.name, 0.0) * error_before**0.5,
                    layer in following,
                )
            ]
            if not rates:
                return ""
            interval = 1 if all(rate.sparse for rate in rates) else options.input_range_interval
            parameters, sparse = [rate.parameter for rate in rates], [rate.parameter for rate in rates if rate.sparse]
            optimizer = Adam(parameters, [rate.value * (interval if rate.sparse else 1) for rate in rates])
            objectives = [objective, RoundingPenalty(list(roundings.values()), options.rounding_strength)]
            stack.enter_context(trainable(parameters))
            for step, index in enumerate(_mini_batches(training, options, self._generator_of_batches())):
                for parameter in sparse:
                    parameter.requires_grad_(step % interval == 0)
                share, weight = share_of_this_rank(index)
                batch = self.dataset.take(share)
                loss = _loss(unit, objectives, batch, drops.mix(batch.call, batch.float_call)) * (weight / unit_error)
                for term in objectives:
                    if (penalty := term.penalty(step / options.iterations)) is not None:
                        loss = loss + penalty
                if step % _LOOK_EVERY == 0:
                    found = loss.detach() / ranks.rank_count()
                    ranks.add_up([found])
                    if not bool(torch.isfinite(found)):
                        return f"the error became {float(found)} at step {step}"
                    error = error_before * float(found)
                    self.progress(step, options.iterations, f"{unit.name}: relative error {error:.3g}")
                learned_now = [parameter for parameter in parameters if parameter.requires_grad]
                loss.backward(inputs=learned_now)
                average_gradients(learned_now)
                optimizer.step(options.rate_at(step))
                # Autocast keeps casts of parameters, which have just changed.
                torch.clear_autocast_cache()
                with torch.no_grad():
                    clamp()
        for quantizers in learned.values():
            for quantizer in quantizers:
                quantizer.finalize_()
        finite = all(is_finite(parameter) for parameter in parameters)
        return "" if finite else "a parameter became NaN or infinite"

    def _generator_of_batches(self) -> torch.Generator:
        """One of its own where ranks draw differently what is dropped, so that all draw the same mini-batches."""
        if ranks.rank_count() == 1 or not self.options.drop_probability:
            return self.generator
        return torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=self.generator)))

    def _samples(self, training: Tensor) -> Iterator[MiniBatch]:
        """Some of the samples, in mini-batches."""
        parts = training[:_FEEDBACK_SAMPLES].split(1 if self.dataset.whole else self.options.batch_size)
        return (self.dataset.take(part) for part in parts)

    def _following(self, learned: Mapping[str, Sequence[Quantizer]]) -> list[QuantizedLayer]:
        """Layers whose weights follow the ratios of their inputs: where these learn, and every reader can follow."""
        names = {layer.name for layer in self.unit.layers}
        found = []
        for layer in self.unit.layers:
            if layer.input_ratio is None or not _follows_ratios(layer, self.options):
                continue
            # The other operand of a product has the same ratios, and no other reader.
            tensor, quantizers = layer.tensors[0], layer.input_quantizers
            if names.issuperset(tensor.readers) and any(set(quantizers) <= set(own) for own in learned.values()):
                found.append(layer)
        return found

    def _learned_quantizers(self) -> dict[str, list[Quantizer]]:
        """Quantizers that learn, by layer; one that several layers share belongs to the first of them."""
        learned: dict[str, list[Quantizer]] = {}
        taken = set(self.fixed)
        for layer in self.unit.layers:
            learned[layer.name] = [quantizer for quantizer in layer.quantizers if quantizer not in taken]
            taken.update(layer.quantizers)
        return learned


def clamping(quantizers: Sequence[Quantizer]) -> Callable[[], None]:
    """A function that does ``Quantizer.clamp_`` for all quantizers, and for affine ones at once.

    Args:
        quantizers: Quantizers, each once.

    Example:
        >>> from lightning_calibtip.quantization.quantizers import make_quantizer
        >>> from lightning_calibtip.quantization.spec import TensorSpec
        >>> quantizer = make_quantizer("input", TensorSpec(8), None, torch.device("cpu"))
        >>> _ = quantizer.scale.data.fill_(-1.0)
        >>> clamping([quantizer])()
        >>> bool(quantizer.scale > 0)
        True
    """
    # One operator for all scales: clamping each for itself would take as long as a small layer's forward pass.
    affine = [
        quantizer
        for quantizer in quantizers
        if isinstance(quantizer, AffineQuantizer) and type(quantizer).clamp_ is AffineQuantizer.clamp_
    ]
    scales, others = [quantizer.scale for quantizer in affine], [q for q in quantizers if q not in affine]
    ratios = [quantizer.ratio for quantizer in affine if quantizer.ratio is not None]

    def clamp() -> None:
        for parameters, smallest in ((scales, SMALLEST_SCALE), (ratios, SMALLEST_RATIO)):
            if parameters:
                torch._foreach_clamp_min_(parameters, smallest)
        for quantizer in others:
            quantizer.clamp_()

    return clamp


def _mini_batches(training: Tensor, options: AdaQuantOptions, generator: torch.Generator) -> Iterator[Tensor]:
    """As many mini-batches as there are steps, in epochs of another order each."""
    queue = training[:0]
    for _ in range(options.iterations):
        if len(queue) < min(options.batch_size, len(training)):
            queue = torch.cat([queue, training[torch.randperm(len(training), generator=generator)]])
        yield queue[: options.batch_size]
        queue = queue[options.batch_size :]
