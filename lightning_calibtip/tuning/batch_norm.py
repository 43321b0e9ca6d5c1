"""BatchNorm re-tuning (Hubara et al. 2021): give folded channels their mean and deviation back."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.logits import float_logits, measure_divergences
from ..calibration.progress import ProgressCallback, no_progress
from ..calibration.replay import CalledAgainError, NotReachedError, Replay
from ..network.folding import FoldedBatchNorm
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.trial import trial
from ..quantization.affine import along

log = logging.getLogger(__name__)

REFERENCES = ("float", "training")

# A channel is stretched by at most this factor: beyond it the statistics of a small set are not to be trusted.
_MAX_STRETCH = 4.0

# Values whose statistics are computed at once on a CPU: so many stay in a processor's cache.
_PIECE = 2**18


@dataclass(frozen=True)
class BatchNormTuningOptions:
    """Options of BatchNorm re-tuning.

    Args:
        reference: ``"training"`` brings channels to the mean beta and the deviation gamma that BatchNorm gave them in
            training (the paper's). ``"float"`` brings them to what the float model has over the same calibration set:
            the set's own deviation from the training data (its few samples, no augmentation) then cancels.

    Raises:
        ValueError: If ``reference`` is unknown.

    Example:
        >>> BatchNormTuningOptions(reference="training").reference
        'training'
    """

    reference: Literal["float", "training"] = "float"

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {self.reference!r}.")


@dataclass(frozen=True)
class BatchNormTuningResult:
    """Outcome of BatchNorm re-tuning.

    Args:
        layers: Names of the layers that a BatchNorm is folded into, in the order of execution.
        divergence_before: KL divergence from the float model before, in nats a sample.
        divergence_after: The same of the state that was kept.
        kept: Whether the tuned state was kept.
        note: Why it was not; ``""`` if it was.

    Example:
        See ``tune_batch_norm``.
    """

    layers: tuple[str, ...]
    divergence_before: float
    divergence_after: float
    kept: bool
    note: str = ""


@torch.no_grad()
def tune_batch_norm(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: BatchNormTuningOptions | None = None,
    store: ActivationStore | None = None,
    progress: ProgressCallback = no_progress,
) -> BatchNormTuningResult:
    """Re-estimate each folded BatchNorm's statistics on the quantized model and fold it again.

    In the order of execution, the mean and deviation of each quantized channel over the calibration set are measured,
    with all layers before it tuned already, and brought back to those of the reference: the bias takes the shift; the
    stretch goes into the scales of the weight's channel, so that the integers stay as they are. Where there is no scale
    for each output channel (weights quantized per tensor, grouped transposed convolutions, float weights), only the
    shift is corrected. If the model ends farther from the float logits than before, it is put back.

    Args:
        network: Calibrated network.
        calibration: Calibration set.
        options: See ``BatchNormTuningOptions``.
        store: Store of captured activations; all are held in memory if None.
        progress: Progress callback, called for each layer.

    Returns:
        The layers and the divergence; no layers if no BatchNorm was folded.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
        TypeError: If the model's output holds no logits.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 2)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(8, 2, 4))
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=2, edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> tune_batch_norm(network, calibration).layers
        ('0',)
    """
    if not network.calibrated:
        raise RuntimeError("BatchNorm tuning measures the quantized model: run Calibration first.")
    calibration.require()
    options, store = options or BatchNormTuningOptions(), store or ActivationStore()
    norms = {fold.layer: fold.normalization for fold in network.plan.folds if fold.layer in network.layers}
    assert network.structure is not None
    order = [name for name in network.structure.calls_of if name in norms]
    if not order:
        return BatchNormTuningResult((), 0.0, 0.0, True)
    structure = network.structure
    wanted: dict[str, tuple[Tensor, Tensor]] = {}
    quantized_stream: Replay | None = None
    if options.reference == "training":
        for name in order:
            norm = network.model.get_submodule(norms[name])
            assert isinstance(norm, FoldedBatchNorm)
            wanted[name] = norm.bias, norm.deviation
        logits = float_logits(network, calibration)
    else:
        with network.quantized(False):
            stream = Replay(network.model, structure, calibration, order, store, to_end=True)
            for layer in [network.layers[name] for name in order]:
                with _where_reached(layer):
                    wanted[layer.name] = _channel_statistics(_finishing(stream, layer), _channel_dim(layer))
            logits = float_logits(network, calibration, _going_on(stream))
            stream.forget()

    def divergences() -> Tensor:
        run = calibration.run if quantized_stream is None else _going_on(quantized_stream)
        return measure_divergences(calibration, logits, range(len(calibration)), run)

    layers, tuned = [network.layers[name] for name in wanted], list[str]()
    with trial(layers, divergences) as attempt:
        quantized_stream = Replay(network.model, structure, calibration, order, store, to_end=True)
        for position, layer in enumerate(layers):
            progress(position, len(layers), layer.name)
            with _where_reached(layer):
                _tune_layer(layer, quantized_stream, wanted[layer.name])
                tuned.append(layer.name)
    quantized_stream.forget()
    before, after = float(attempt.before.mean()), float(attempt.after.mean())
    note = ""
    if not attempt.kept:
        note = f"it did not lower the divergence ({before:.4g} to {float(attempt.tried.mean()):.4g})"
        log.warning("BatchNorm tuning: layers restored, since %s.", note)
    return BatchNormTuningResult(tuple(tuned), before, after, attempt.kept, note)


@contextmanager
def _where_reached(layer: QuantizedLayer) -> Iterator[None]:
    """Inside, a layer that some batches do not reach is left as it is, with a warning."""
    try:
        yield
    except NotReachedError as error:
        log.warning("%s: its BatchNorm is not tuned, since %s.", layer.name, error)


def _tune_layer(layer: QuantizedLayer, stream: Replay, reference: tuple[Tensor, Tensor]) -> None:
    """Bring a layer's channels to the statistics of the reference, and go on to the next layer."""
    rounds = layer.output_quantizer is not None
    record = stream.record(layer.name, keep_inputs=rounds)
    assert record.outputs is not None
    dim = _channel_dim(layer)
    stretch, shift = _refold(layer, _channel_statistics(record.outputs.views(), dim), reference)
    if record.inputs is not None:
        outputs = stream.record_again(layer.name, record.inputs)
        record.inputs.forget()
    else:
        # The integers stay as they are, so that the outputs need not be computed again.
        outputs = stream.recording(layer.name)
        for output in record.outputs.views():
            factor, added = (along(each, output.dim(), dim % output.dim()) for each in (stretch, shift))
            outputs.append(torch.addcmul(added, output, factor).to(output.dtype))
    record.outputs.forget()
    stream.finish(layer.name, outputs)


def _going_on(stream: Replay) -> Callable[[int], Any]:
    """How a batch goes through the model once all layers are finished: their stored outputs need not be computed again,
    unless they are stored with less precision or cannot answer for a batch."""

    def run(index: int) -> Any:
        try:
            return stream.run(index)
        except CalledAgainError:
            return stream.calibration.run(index)

    return run if stream.store.precision is None else stream.calibration.run


def _finishing(stream: Replay, layer: QuantizedLayer) -> Iterator[Tensor]:
    """Outputs of a layer at all its calls; from then on the layer answers with them."""
    recording = stream.recording(layer.name)
    try:
        for output in stream.outputs(layer.name):
            recording.append(output)
            yield output
    except NotReachedError:
        recording.forget()
        raise
    stream.finish(layer.name, recording)


def _channel_dim(layer: QuantizedLayer) -> int:
    """Dimension of a layer's output that runs over its channels: that of its input's."""
    axis = layer.type.operands[0].channel_axis if layer.type.operands else None
    return 1 if axis is None else axis


def _channel_statistics(outputs: Iterable[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all samples and positions, merged piece by piece (Chan, Golub,
    LeVeque 1979).

    Args:
        outputs: Outputs of a layer.
        dim: Their dimension that runs over channels.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for output in outputs:
        if output.numel() == 0:
            continue
        at = dim % output.dim()
        channels = output.detach().reshape(output.shape[:at].numel(), output.shape[at], -1)
        rows = max(1, _PIECE // channels[0].numel()) if channels.device.type == "cpu" else len(channels)
        for piece in channels.split(rows):
            piece = piece.float()
            added = piece.shape[0] * piece.shape[2]
            total = count + added
            of_piece = piece.mean(2).mean(0)
            gap = of_piece - mean.to(piece.device)
            # Several times as fast as torch.var, and as exact.
            around = torch.linalg.vector_norm(piece - of_piece.unsqueeze(1), dim=2).square().sum(0)
            squares = squares.to(gap.device) + around + gap.square() * (count * added / total)
            mean, count = mean.to(gap.device) + gap * (added / total), total
    return mean, (squares / count).sqrt()


def _refold(
    layer: QuantizedLayer, present: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Bring a layer's output from its present mean and deviation of each channel to the wanted ones; returns what each
    channel of the output is multiplied by, and what is added to it."""
    mean, deviation = present
    wanted_mean, wanted_deviation = wanted
    alive = (wanted_deviation > 0) & (deviation > 0)
    stretch = torch.where(alive, wanted_deviation / deviation, 1.0).clamp(1 / _MAX_STRETCH, _MAX_STRETCH)
    # Channels of the output are those of the weight, but for grouped transposed convolutions.
    is_by_channel = layer.has_weight and layer.weight.shape[layer.channel_axis] == len(mean)
    if is_by_channel and layer.weight_quantizer is not None and layer.weight_quantizer.rescale_(stretch):
        layer.weight.mul_(stretch.view([-1 if d == layer.channel_axis else 1 for d in range(layer.weight.dim())]))
    else:
        stretch = torch.ones_like(mean)
    assert layer.bias is not None
    layer.bias.copy_(wanted_mean + (layer.bias - mean) * stretch)
    return stretch, wanted_mean - mean * stretch
