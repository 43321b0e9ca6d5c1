"""BatchNorm re-tuning (Hubara et al. 2021): give folded channels their mean and deviation back."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.logits import float_logits, measure_divergences
from ..calibration.replay import Replay
from ..calibration.steps import Steps, untold
from ..quantization.folding import FoldedBatchNorm
from ..quantization.layers import QuantizedLayer
from ..quantization.network import QuantizedNetwork

log = logging.getLogger(__name__)

REFERENCES = ("float", "training")

# A channel is stretched by at most this factor: beyond it the statistics of a small set are not to be trusted.
_MAX_STRETCH = 4.0


@dataclass(frozen=True)
class BatchNormTuningResult:
    """KL divergence (nats a sample) from the float model before and after, and whether the tuned state was kept."""

    layers: tuple[str, ...]
    divergence_before: float
    divergence_after: float
    kept: bool


@torch.no_grad()
def tune_batch_norm(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    reference: str = "float",
    store: ActivationStore | None = None,
    steps: Steps = untold,
) -> BatchNormTuningResult:
    """Re-estimate each folded BatchNorm's statistics on the quantized model and fold it again.

    In the order of execution, the mean and deviation of each quantized channel over the calibration set are measured,
    with all layers before it tuned already, and brought back to those of the reference: the bias takes the shift; the
    stretch goes into the per-channel weight scale, so that the integers stay as they are. Where there is no scale for
    each output channel (weights quantized per tensor, grouped transposed convolutions), only the shift is corrected. If
    the model ends farther from the float logits than before, it is put back.

    Args:
        network: Calibrated.
        calibration: The samples.
        reference: ``"training"`` brings channels to the mean beta and the deviation gamma that BatchNorm gave them in
            training (the paper's). ``"float"`` brings them to what the float model has over the same calibration set:
            the set's own deviation from the training data (its few samples, no augmentation) then cancels.
        store: Where captured activations are kept; all in memory if None.
        steps: Told of each layer.

    Returns:
        The layers and the divergence; no layers if no BatchNorm was folded.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
        ValueError: If ``reference`` is unknown.
        TypeError: If the model's output holds no logits.
    """
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {reference!r}.")
    if not network.calibrated:
        raise RuntimeError("BatchNorm tuning measures the quantized model: run Calibration first.")
    calibration.require()
    assert network.structure is not None
    folds = {fold.layer: fold for fold in network.folds if fold.layer in network.layers}
    order = [name for name in network.structure.calls_of if name in folds]
    if not order:
        return BatchNormTuningResult((), 0.0, 0.0, True)
    logits, everything = float_logits(network, calibration), list(range(len(calibration)))
    before = float(measure_divergences(calibration, logits, everything).mean())
    initial = {name: network.layers[name].save() for name in order}
    store = store or ActivationStore()
    float_stream, quantized_stream = (
        Replay(network.model, network.structure, calibration, order, store) for _ in range(2)
    )
    for position, name in enumerate(order):
        steps(position, len(order), name)
        layer = network.layers[name]
        norm = network.model.get_submodule(folds[name].normalization)
        assert isinstance(norm, FoldedBatchNorm)
        wanted = norm.bias, norm.deviation
        if reference == "float":
            with network.quantized(False):
                wanted = _channel_statistics(_finishing(float_stream, layer))
        _refold(layer, _channel_statistics(_outputs(quantized_stream, layer)), wanted)
        for _ in _finishing(quantized_stream, layer):
            pass
    after = float(measure_divergences(calibration, logits, everything).mean())
    kept = after < before
    if not kept:
        for name, state in initial.items():
            network.layers[name].restore(state)
        log.warning("BatchNorm tuning did not lower the divergence (%.4g to %.4g): restored.", before, after)
    return BatchNormTuningResult(tuple(order), before, after if kept else before, kept)


def _outputs(stream: Replay, layer: QuantizedLayer) -> Iterator[Tensor]:
    """Outputs of a layer at all its calls."""
    for calls in stream.capture(layer.name):
        for call in calls:
            yield layer.module(*call.args, **call.kwargs)


def _finishing(stream: Replay, layer: QuantizedLayer) -> Iterator[Tensor]:
    """The same, and from then on the layer answers with them."""
    recording = stream.recording(layer.name)
    for output in _outputs(stream, layer):
        recording.append(output)
        yield output
    stream.finish(layer.name, recording)


def _channel_statistics(outputs: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel (dimension 1) over all samples and positions, merged batch by batch
    (Chan, Golub, LeVeque 1979)."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for output in outputs:
        channels = output.detach().float().transpose(0, 1).flatten(1)
        added, total = channels.shape[1], count + channels.shape[1]
        gap = channels.mean(1) - mean.to(channels.device)
        squares = (
            squares.to(gap.device) + channels.var(1, correction=0) * added + gap.square() * (count * added / total)
        )
        mean, count = mean.to(gap.device) + gap * (added / total), total
    return mean, (squares / count).sqrt()


def _refold(layer: QuantizedLayer, present: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Bring a layer's output from its present mean and deviation of each channel to the wanted ones."""
    mean, deviation = present
    wanted_mean, wanted_deviation = wanted
    stretch = torch.ones_like(mean)
    assert layer.weight_quantizer is not None
    scale = layer.weight_quantizer.scale
    if layer.weight_quantizer.axis is not None and scale.shape == mean.shape:
        alive = (wanted_deviation > 0) & (deviation > 0)
        stretch = torch.where(alive, wanted_deviation / deviation, 1.0).clamp(1 / _MAX_STRETCH, _MAX_STRETCH)
        scale.mul_(stretch)
        layer.weight.mul_(stretch.view([-1 if d == layer.channel_axis else 1 for d in range(layer.weight.dim())]))
    assert layer.bias is not None
    layer.bias.copy_(wanted_mean + (layer.bias - mean) * stretch)
