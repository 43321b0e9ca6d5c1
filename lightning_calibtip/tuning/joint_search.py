"""Joint search of all quantization steps (LAPQ: Nahshan et al. 2021): no gradients, the network's own loss decides."""

import logging
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ranks
from ..calibration.calibration_set import CalibrationSet
from ..calibration.fingerprint import digest_data, digest_states
from ..calibration.logits import float_logits, measure_divergences
from ..calibration.progress import ProgressCallback, no_progress
from ..files.digest import digest
from ..files.state_folder import holding
from ..network.hooks import make_room_for_bias
from ..network.network import QuantizedNetwork
from ..network.trial import trial
from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.observers import HistogramObserver
from ..quantization.ranges import RangeOptions, weight_range
from .measured import FILE_NAME, MeasuredLosses
from .replayed_prefix import ReplayedPrefix, first_layer_of

# Gives the way in which batches are run, when it is asked; None for whole passes.
Runner = Callable[[], Callable[[int], Any] | None]

log = logging.getLogger(__name__)

# Exponents of the layer-wise error that are tried first.
EXPONENTS = tuple(2 + 2 * i / 9 for i in range(10))

# A step may shrink and grow by these factors.
_BOUNDS = (0.5, 1.5)


@dataclass(frozen=True)
class JointSearchResult:
    """Outcome of the joint search.

    Args:
        p: Exponent of the layer-wise error that the search started from.
        divergences: Divergence of the ranges for each exponent that was tried, in nats a sample.
        divergence_before: Divergence of the ranges as they were calibrated.
        divergence_after: Divergence of the state that was kept, on the same samples.
        evaluations: How often the network's divergence was measured.

    Example:
        See ``search_jointly``.
    """

    p: float
    divergences: dict[float, float]
    divergence_before: float
    divergence_after: float
    evaluations: int


@torch.no_grad()
def search_jointly(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: RangeOptions,
    progress: ProgressCallback = no_progress,
    state_folder: Path | None = None,
) -> JointSearchResult:
    """Choose the steps of all weights and activations together, by the divergence from the float logits.

    Ranges of least L_p error are tried for several p; a parabola through the network's loss gives p* (section 4.2);
    from there, Powell's method moves one factor for each quantizer, that of its scales (section 4.3). The steps stay
    as they were calibrated where nothing comes closer to the float model.

    Args:
        network: Calibrated network; ranges of tensors whose observers keep no histograms start as they are.
        calibration: Calibration set, whose first samples are measured on.
        options: ``joint_samples``, ``joint_iterations`` and ``joint_evaluations``, see ``RangeOptions``.
        progress: Progress callback, over the evaluations.
        state_folder: Folder for what was measured, from which a killed search is resumed; None to keep nothing.

    Returns:
        The exponent, the divergences, and the number of evaluations.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
        TypeError: If the model's output holds no logits.
        ValueError: If ``state_folder`` holds another search, or something else.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(64, 4))
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=3, activation_bits=3, edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> result = search_jointly(network, calibration, RangeOptions(search="joint", joint_evaluations=60))
        >>> result.divergence_after <= result.divergence_before, result.evaluations <= 60
        (True, True)
    """
    if not network.calibrated:
        raise RuntimeError("The joint search starts from calibrated ranges: run Calibration first.")
    calibration.require()
    with holding(state_folder):
        return _search_jointly(network, calibration.first(options.joint_samples), options, progress, state_folder)


def _search_jointly(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: RangeOptions,
    progress: ProgressCallback,
    state_folder: Path | None,
) -> JointSearchResult:
    logits, everything = float_logits(network, calibration), list(range(len(calibration)))
    layers = list(network.layers.values())
    losses = MeasuredLosses(None, "")
    if state_folder is not None:
        states = digest_states(layer.save() for layer in layers)
        run = digest([network.fingerprint, states, digest_data(calibration), options])
        losses = MeasuredLosses(state_folder / FILE_NAME, run)

    def divergences(run: Callable[[int], Any] | None) -> Tensor:
        # One process may have measured before what another one has not.
        with ranks.alone():
            return measure_divergences(calibration, logits, everything, run)

    search = _Search(lambda run: losses.next(lambda: divergences(run())), options.joint_evaluations, progress)
    with trial(layers, search.samples) as attempt:
        before = search.least
        by_exponent = {p: search.measure(partial(_fit, network, p)) for p in EXPONENTS}
        start = _vertex(by_exponent)
        if start not in by_exponent:
            by_exponent[start] = search.measure(partial(_fit, network, start))
        start = min(by_exponent, key=lambda p: by_exponent[p])
        _fit(network, start)
        _powell(network, calibration, search, options)
    after = float(attempt.after.mean())
    log.info("Joint search: p = %.2f, divergence %.4g to %.4g.", start, before, after)
    return JointSearchResult(start, by_exponent, before, after, search.evaluations)


class _Search:
    """The network's loss, counted."""

    def __init__(self, divergences: Callable[[Runner], Tensor], most: int, progress: ProgressCallback) -> None:
        self.divergences, self.most, self.progress = divergences, most, progress
        self.evaluations = 0
        self.least = float("inf")

    @property
    def spent(self) -> bool:
        """Whether no evaluation is left; one is kept for the last judgement."""
        return self.evaluations >= self.most - 1

    def samples(self, run: Runner = lambda: None) -> Tensor:
        """Mean divergence, shape (1,); ``run`` gives the way in which batches are run, None for whole passes."""
        self.evaluations += 1
        found = self.divergences(run)
        self.least = min(self.least, float(found.mean()))
        self.progress(min(self.evaluations, self.most), self.most, f"divergence {self.least:.4g}")
        return found

    def measure(self, change: Callable[[], None], run: Runner = lambda: None) -> float:
        """Mean divergence after a change; infinity where none is left or it is no number."""
        if self.spent:
            return float("inf")
        change()
        loss = float(self.samples(run).mean())
        return loss if np.isfinite(loss) else float("inf")


def _fit(network: QuantizedNetwork, p: float) -> None:
    """Ranges of least L_p error."""
    for tensor in network.tensors:
        observer = tensor.observer
        # After a checkpoint was loaded there are none: those ranges stay.
        if isinstance(observer, HistogramObserver) and observer.seen:
            was = observer.method, observer.p
            observer.method, observer.p = "lp", p
            try:
                for spec, quantizer in tensor.quantizers.items():
                    if spec.equalized is None and quantizer.enabled and not spec.dynamic:
                        tensor.fit_range(spec)
            finally:
                observer.method, observer.p = was
    options = RangeOptions(weight_observer="lp", p=p)
    for layer in network.layers.values():
        if (weights := layer.weight_quantizer) is not None:
            weights.set_range(*weight_range(layer.latent()[0], weights.spec, options))
        make_room_for_bias(layer.config, layer.latent()[1], layer.input_quantizers, layer.weight_quantizer)


def _vertex(by_exponent: dict[float, float]) -> float:
    """Exponent of least loss by a parabola through the finite losses; the best that was tried if it opens downward."""
    tried = [p for p, loss in by_exponent.items() if np.isfinite(loss)]
    best = min(by_exponent, key=lambda p: by_exponent[p])
    if len(tried) < 3:
        return best
    square, slope, _ = np.polyfit(tried, [by_exponent[p] for p in tried], 2)
    if square <= 0:
        return best
    return float(np.clip(-slope / (2 * square), min(tried), max(tried)))


def _powell(network: QuantizedNetwork, calibration: CalibrationSet, search: _Search, options: RangeOptions) -> None:
    """Powell's method over one factor of the scales of each quantizer, in the order of execution, so that what comes
    before the layer in question need not be computed again; leaves the best factors that were seen."""
    from scipy.optimize import minimize

    quantizers = [
        quantizer
        for quantizer in network.quantizers
        if isinstance(quantizer, AffineQuantizer) and quantizer.acts_as_stored and not quantizer.spec.dynamic
    ]
    firsts = {quantizer: first_layer_of(network, quantizer) for quantizer in quantizers}
    quantizers.sort(key=lambda quantizer: firsts[quantizer])
    prefix = ReplayedPrefix(network, calibration, quantizers, [firsts[quantizer] for quantizer in quantizers])
    scales = [quantizer.scale.detach().clone() for quantizer in quantizers]
    ones = np.ones(len(quantizers))
    best, best_factors = float("inf"), ones

    def apply(factors: Any) -> None:
        for quantizer, scale, factor in zip(quantizers, scales, factors, strict=True):
            quantizer.scale.copy_(scale * float(factor))

    def loss(factors: Any) -> float:
        nonlocal best, best_factors
        if search.spent:
            raise _SpentError
        found = search.measure(lambda: apply(factors), lambda: prefix.run_at(factors))
        if found < best:
            best, best_factors = found, np.array(factors)
        return found

    settings = {"maxiter": options.joint_iterations, "xtol": 0.02, "ftol": 1e-3}
    with suppress(_SpentError), closing(prefix):
        minimize(loss, ones, method="Powell", bounds=[_BOUNDS] * len(quantizers), options=settings)
    apply(best_factors)


class _SpentError(Exception):
    """Ends Powell's method when no evaluation is left."""
