"""Applying the remedies of a diagnosis, one by one, until the user's own metric is good enough."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..allocation.costs import CostInputs, cost_table
from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.losses import Loss
from ..calibration.progress import ProgressCallback, no_progress
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.trial import trial
from ..quantization.ranges import RangeOptions
from ..quantization.spec import BitWidths
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
    lowers the loss most is kept. Validation runs after 1, 2, 4, 8, ... of them; where the metric is then good enough,
    the fewest that make it so are sought by bisection, and where it never is, it runs after the others, too. What needs
    a new calibration (``per_token``, groups) or a longer run (``AdaQuant``) is left to the user. Where the tolerance is
    not reached, the model ends with the remedies up to the best value of the metric, with none if all made it worse;
    where validation raises, as it was.

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
        ValueError: If validation logs nothing, or not the metric that the options name, or that is no finite number.

    Example:
        See ``Diagnosis``, whose tests apply remedies to a small network.
    """
    store = store or ActivationStore()
    with network.quantized(False):
        float_metrics = dict(evaluate())
    name = _metric_name(options.metric, float_metrics)
    wanted, start = float_metrics[name], float(evaluate()[name])
    if not math.isfinite(wanted) or not math.isfinite(start):
        raise ValueError(
            f"{name} is {start} of the quantized model and {wanted} of the float one: both must be finite numbers."
        )
    mode = options.mode or ("max" if start <= wanted else "min")

    def lost(metric: float) -> float:
        return wanted - metric if mode == "max" else metric - wanted

    loss = Loss(network, calibration, options.loss, options.samples_of(calibration.samples))
    _observe_again(network, calibration)
    waiting, idle = _by_cost(result), list[Remedy]()
    applied: list[AppliedRemedy] = []
    steps = _Steps(network)
    # The metric by the number of remedies that were applied; the next number at which it is asked for.
    metrics, due = {0: start}, 1
    least, size = loss(), weight_bytes(network)
    with trial(network.layers.values()) as attempt:
        while waiting and lost(metrics[max(metrics)]) > options.max_degradation:
            losses: dict[Remedy, float] = {}
            for remedy in waiting[: options.tries]:
                losses[remedy] = _try(remedy, network, calibration, loss, store)
                change = losses[remedy] - least
                progress(len(applied), len(applied) + len(waiting), f"{remedy.code}: loss {change:+.3g}")
            # What does not help is tried again when something else was applied.
            helping = [remedy for remedy, found in losses.items() if found < least]
            idle += [remedy for remedy in losses if remedy not in helping]
            waiting = [remedy for remedy in waiting if remedy not in idle]
            if helping:
                chosen = min(helping, key=losses.__getitem__)
                with steps.one_more(chosen.layer):
                    _apply(chosen, network, calibration, store)
                least = losses[chosen]
                waiting = [r for r in [*waiting, *idle] if r is not chosen and not _is_covered(r, network)]
                idle = []
                before, size = size, weight_bytes(network)
                applied.append(AppliedRemedy(chosen.code, least, None, size - before))
                log.info("%s: loss %.4g, %+d bytes of weights", chosen.code, least, size - before)
            if len(applied) == due or (not waiting and len(applied) not in metrics):
                metrics[len(applied)], due = float(evaluate()[name]), 2 * len(applied)
        enough = len(applied) if lost(metrics[max(metrics)]) <= options.max_degradation else None
        too_few = max((number for number in metrics if number != enough), default=0)
        while enough is not None and enough - too_few > 1:
            steps.go_to(between := (too_few + enough) // 2)
            metrics[between] = float(evaluate()[name])
            if lost(metrics[between]) <= options.max_degradation:
                enough = between
            else:
                too_few = between
        # The metric need not improve with every remedy: where the last was not enough, one before it may have been.
        for number in range(len(applied), 0, -1) if enough is None else ():
            if number not in metrics:
                steps.go_to(number)
                metrics[number] = float(evaluate()[name])
            if lost(metrics[number]) <= options.max_degradation:
                enough = number
                break
        best = min(sorted(metrics), key=lambda number: lost(metrics[number])) if enough is None else enough
        steps.go_to(best)
        if not best:
            attempt.fail(f"{name} came no closer")
    tried = len(applied)
    applied = [replace(one, metric=metrics.get(number)) for number, one in enumerate(applied[:best], 1)]
    outcome = _outcome(options, name, wanted, metrics[best], lost(metrics[best]), applied, tried)
    return replace(result, applied=tuple(applied), outcome=outcome)


class _State:
    """Layers as they are, and what equalization has marked in the network."""

    def __init__(self, network: QuantizedNetwork, layers: Iterable[QuantizedLayer]) -> None:
        self._network, self._layers = network, [(layer, layer.save()) for layer in layers]
        self._learnable = {tensor: tensor.learnable for tensor in network.tensors}
        tensors = {tensor.name: tensor for tensor in network.tensors}
        self._absorbers = {tensors[m.absorbs]: m.name for m in network.plan.modules if m.absorbs in tensors}

    def restore(self) -> None:
        for layer, state in self._layers:
            layer.restore(state)
        for tensor, channels in self._learnable.items():
            tensor.learnable = channels
        self._network.set_absorbers(self._absorbers)


class _Steps:
    """The way from the network as it was, which can be gone back and forth."""

    def __init__(self, network: QuantizedNetwork) -> None:
        self._network, self._position = network, 0
        self._steps: list[tuple[_State, _State]] = []

    @contextmanager
    def one_more(self, name: str | None) -> Iterator[None]:
        """Inside, the last step is made: one layer is changed, or any."""
        layers = self._network.layers
        changed = list(layers.values()) if name is None else [layers[name]]
        before = _State(self._network, changed)
        yield
        self._steps.append((before, _State(self._network, changed)))
        self._position = len(self._steps)

    def go_to(self, position: int) -> None:
        """Bring the network to where it was after so many steps."""
        while self._position > position:
            self._position -= 1
            self._steps[self._position][0].restore()
        while self._position < position:
            self._steps[self._position][1].restore()
            self._position += 1


def _outcome(
    options: DiagnosisOptions,
    name: str,
    wanted: float,
    present: float,
    lost: float,
    applied: Sequence[AppliedRemedy],
    tried: int,
) -> str:
    cost = sum(remedy.bytes for remedy in applied)
    which = "worse" if lost > 0 else "better"
    what = f"{name} is {present:.4g}, {abs(lost):.4g} {which} than the float model's {wanted:.4g}"
    number = "1 remedy was" if len(applied) == 1 else f"{len(applied)} remedies were"
    done = f"{number} applied for {cost:,} bytes of weights" if applied else "nothing was applied"
    if lost <= options.max_degradation:
        return f"{what}: within max_degradation={options.max_degradation:g}; {done}."
    further = (
        f" {tried - len(applied)} more lowered the loss, but not the distance of {name}."
        if tried > len(applied)
        else ""
    )
    return (
        f"{what}, and no other remedy brings it closer: max_degradation={options.max_degradation:g} is not reached; "
        f"{done}.{further} What is left needs a new calibration or a reconstruction (AdaQuant), see the remedies of "
        "each layer."
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
        _widen(network, remedy.layer, remedy.bits)


def _widen(network: QuantizedNetwork, name: str, bits: BitWidths) -> None:
    """Give a layer more bits; a reconstructed weight whose format does not change stays as it is."""
    layer = network.layers[name]
    before, ratio = layer.save(), layer.input_ratio
    network.switch(name, bits)
    if layer.config.weight == before.config.weight and ratio is None:
        after = layer.save()
        own = 0 if layer.weight_quantizer is None else len(list(layer.weight_quantizer.parameters()))
        qparams = [*before.qparams[:own], *after.qparams[own:]]
        layer.restore(replace(after, weight=before.weight, bias=before.bias, errors=before.errors, qparams=qparams))


def _try(
    remedy: Remedy, network: QuantizedNetwork, calibration: CalibrationSet, loss: Loss, store: ActivationStore
) -> float:
    """The loss with a remedy; the network is then as it was."""
    layers = network.layers
    before = _State(network, layers.values() if remedy.layer is None else [layers[remedy.layer]])
    try:
        _apply(remedy, network, calibration, store)
        return loss()
    finally:
        before.restore()


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
    present = {name: [layer.config.bit_widths] for name, layer in network.layers.items()}
    # This cost looks at no data.
    table = cost_table("weight_bytes", CostInputs(network, CalibrationSet(lambda batch, index: None), present))
    return math.ceil(sum(cost for of_layer in table.values() for cost in of_layer.values()))
