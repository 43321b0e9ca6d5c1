"""Applying the remedies of a diagnosis, one by one, until the user's own metric is good enough."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.losses import Loss
from ..calibration.progress import ProgressCallback, no_progress
from ..network.network import QuantizedNetwork
from ..network.trial import trial
from ..quantization.ranges import RangeOptions
from .diagnose import AppliedRemedy, DiagnosisResult
from .options import DiagnosisOptions
from .remedies import Remedy, distinct

log = logging.getLogger(__name__)

Evaluate = Callable[[], Mapping[str, float]]


def apply_remedies(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    result: DiagnosisResult,
    options: DiagnosisOptions,
    evaluate: Evaluate,
    store: ActivationStore | None = None,
    progress: ProgressCallback = no_progress,
) -> DiagnosisResult:
    """Apply remedies until the user's metric is within ``max_degradation`` of the float model's, or none helps.

    In each round the gain of ``tries`` remedies is measured, those of the layers that cost most first, and the one that
    lowers the loss most is kept. What needs a new calibration (``per_token``, groups) or a longer run (``AdaQuant``) is
    left to the user.

    Args:
        network: The network that was diagnosed.
        calibration: Its calibration set.
        result: The diagnosis.
        options: Its options.
        evaluate: Gives the metrics of the model as it is.
        store: Store of captured activations; all in memory if None.
        progress: Progress callback, called for each remedy that is tried.

    Returns:
        The diagnosis with what was applied and what came of it.

    Raises:
        ValueError: If validation logs nothing, or not the metric that the options name.

    Example:
        See ``Diagnosis``, whose tests apply remedies to a small network.
    """
    store = store or ActivationStore()
    with network.quantized(False):
        float_metrics = dict(evaluate())
    name = _metric_name(options.metric, float_metrics)
    wanted, present = float_metrics[name], float(evaluate()[name])
    mode = options.mode or ("max" if present <= wanted else "min")

    def lost(metric: float) -> float:
        return wanted - metric if mode == "max" else metric - wanted

    loss = Loss(network, calibration, options.loss, options.samples_of(calibration.samples))
    _observe_again(network, calibration)
    waiting = _by_cost(result)
    applied: list[AppliedRemedy] = []
    least, size = loss(), weight_bytes(network)
    while lost(present) > options.max_degradation and waiting:
        losses: dict[Remedy, float] = {}
        for remedy in waiting[: options.tries]:
            losses[remedy] = _try(remedy, network, calibration, loss, store)
            change = losses[remedy] - least
            progress(len(applied), len(applied) + len(waiting), f"{remedy.code}: loss {change:+.3g}")
        # What does not help by itself is not tried again.
        helping = [remedy for remedy, found in losses.items() if found < least]
        waiting = [remedy for remedy in waiting if remedy in helping or remedy not in losses]
        if not helping:
            continue
        chosen = min(helping, key=losses.__getitem__)
        _apply(chosen, network, calibration, store)
        least = losses[chosen]
        waiting = [remedy for remedy in waiting if remedy is not chosen and not _is_covered(remedy, network)]
        present = float(evaluate()[name])
        before, size = size, weight_bytes(network)
        applied.append(AppliedRemedy(chosen.code, least, present, size - before))
        log.info("%s: loss %.4g, %s %.4g, %+d bytes of weights", chosen.code, least, name, present, size - before)
    return replace(result, applied=tuple(applied), outcome=_outcome(options, name, wanted, present, lost, applied))


def _outcome(
    options: DiagnosisOptions,
    name: str,
    wanted: float,
    present: float,
    lost: Callable[[float], float],
    applied: list[AppliedRemedy],
) -> str:
    cost = sum(remedy.bytes for remedy in applied)
    what = f"{name} is {present:.4g}, {lost(present):.4g} worse than the float model's {wanted:.4g}"
    done = f"{len(applied)} remedies were applied for {cost:,} bytes of weights" if applied else "nothing was applied"
    if lost(present) <= options.max_degradation:
        return f"{what}: within max_degradation={options.max_degradation:g}; {done}."
    return (
        f"{what}, and no other remedy lowers the loss: max_degradation={options.max_degradation:g} is not reached; "
        f"{done}. What is left needs a new calibration or a reconstruction (AdaQuant), see the remedies of each layer."
    )


def _metric_name(metric: str | None, logged: Mapping[str, float]) -> str:
    if not logged:
        raise ValueError("apply=True needs a metric to stop at, and validation logs none: log one in validation_step.")
    if metric is not None and metric not in logged:
        raise ValueError(f"metric={metric!r} is not logged by validation, only {', '.join(logged)}.")
    return metric or next(iter(logged))


def _by_cost(result: DiagnosisResult) -> list[Remedy]:
    """Remedies that can be applied, of the layers that cost most first; what acts on the whole model counts once."""
    found = distinct([remedy for layer in result.worst() for remedy in layer.remedies if remedy.applicable])
    of_model = [remedy for remedy in found if remedy.layer is None]
    return [*of_model, *(remedy for remedy in found if remedy.layer is not None)]


def _is_covered(remedy: Remedy, network: QuantizedNetwork) -> bool:
    """Whether a layer has the bit-widths already that a remedy would give it, or wider ones."""
    if remedy.layer is None or remedy.bits is None:
        return False
    present = network.layers[remedy.layer].config.bit_widths
    pairs = ((present.weight, remedy.bits.weight), (present.activation, remedy.bits.activation))
    return all(has is None or (wants is not None and has >= wants) for has, wants in pairs)


def _apply(remedy: Remedy, network: QuantizedNetwork, calibration: CalibrationSet, store: ActivationStore) -> None:
    if remedy.act is not None:
        remedy.act(network, calibration, store)
    elif remedy.layer is not None and remedy.bits is not None:
        network.switch(remedy.layer, remedy.bits)


def _try(
    remedy: Remedy, network: QuantizedNetwork, calibration: CalibrationSet, loss: Loss, store: ActivationStore
) -> float:
    """The loss with a remedy; the network is then as it was."""
    with trial(network.layers.values()) as attempt:
        _apply(remedy, network, calibration, store)
        found = loss()
        attempt.fail("only tried")
    return found


@torch.no_grad()
def _observe_again(network: QuantizedNetwork, calibration: CalibrationSet) -> None:
    """Give activations observers where a checkpoint has brought none along: other bit-widths have other ranges."""
    if all(tensor.observed for layer in network.layers.values() for tensor in layer.tensors):
        return
    network.attach_observers(next((layer.range_options for layer in network.layers.values()), RangeOptions()))
    for index in range(len(calibration)):
        with network.observing(calibration.tokens(index)):
            calibration.run(index)


def weight_bytes(network: QuantizedNetwork) -> int:
    """Bytes of the weights of all quantized layers at their present bit-widths.

    Example:
        See ``apply_remedies``, which says what remedies cost.
    """
    sizes = (
        layer.weight.numel() * (32 if layer.config.weight is None else layer.config.weight.bits)
        for layer in network.layers.values()
    )
    return sum((bits + 7) // 8 for bits in sizes)
