"""BatchNorm re-tuning (Hubara et al. 2021): give folded channels their mean and deviation back."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.calibration_set import CalibrationSet
from ..calibration.logits import float_logits, measure_divergences
from ..calibration.replay import Replay, UnitCall
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
    network: QuantizedNetwork, calibration: CalibrationSet, reference: str = "float"
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
    float_stream, quantized_stream = (Replay(network.model, network.structure, calibration, order) for _ in range(2))
    for name in order:
        layer = network.layers[name]
        norm = network.model.get_submodule(folds[name].normalization)
        assert isinstance(norm, FoldedBatchNorm)
        wanted = norm.bias, norm.deviation
        if reference == "float":
            with network.quantized(False):
                outputs = _outputs(layer, float_stream.capture(name))
            wanted = _channel_statistics(outputs)
            float_stream.finish(name, outputs)
        calls = quantized_stream.capture(name)
        _refold(layer, _channel_statistics(_outputs(layer, calls)), wanted)
        quantized_stream.finish(name, _outputs(layer, calls))
    after = float(measure_divergences(calibration, logits, everything).mean())
    kept = after < before
    if not kept:
        for name, state in initial.items():
            network.layers[name].restore(state)
        log.warning("BatchNorm tuning did not lower the divergence (%.4g to %.4g): restored.", before, after)
    return BatchNormTuningResult(tuple(order), before, after if kept else before, kept)


def _outputs(layer: QuantizedLayer, calls: list[list[UnitCall]]) -> list[list[Tensor]]:
    return [[layer.module(*call.args, **call.kwargs) for call in batch] for batch in calls]


def _channel_statistics(batches: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel (dimension 1) over all samples and positions."""
    outputs = [output for batch in batches for output in batch]
    count = sum(output.numel() // output.shape[1] for output in outputs)
    over = [0, *range(2, outputs[0].dim())]
    mean = sum((output.float().sum(over) for output in outputs), torch.zeros(())) / count
    shape = [1, -1, *[1] * (outputs[0].dim() - 2)]
    squares = sum(((output.float() - mean.view(shape)).square().sum(over) for output in outputs), torch.zeros(()))
    return mean, (squares / count).sqrt()


def _refold(layer: QuantizedLayer, present: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Bring a layer's output from its present mean and deviation of each channel to the wanted ones."""
    mean, deviation = present
    wanted_mean, wanted_deviation = wanted
    stretch = torch.ones_like(mean)
    scale = layer.weight_quantizer.scale
    if layer.weight_quantizer.axis is not None and scale.shape == mean.shape:
        alive = (wanted_deviation > 0) & (deviation > 0)
        stretch = torch.where(alive, wanted_deviation / deviation, 1.0).clamp(1 / _MAX_STRETCH, _MAX_STRETCH)
        scale.mul_(stretch)
        layer.weight.mul_(stretch.view([-1 if d == layer.channel_axis else 1 for d in range(layer.weight.dim())]))
    assert layer.bias is not None
    layer.bias.copy_(wanted_mean + (layer.bias - mean) * stretch)
