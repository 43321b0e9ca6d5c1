"""BatchNorm re-tuning (Hubara et al. 2021, section 5): give folded channels back the mean and deviation they were trained to."""

import torch
from torch import Tensor

from ..calibration.calibration_set import CalibrationSet
from ..calibration.replay import Replay
from ..quantization.folding import FoldedBatchNorm
from ..quantization.layers import QuantizedLayer
from ..quantization.network import QuantizedNetwork

# A channel is stretched by at most this factor: beyond it the statistics of a small set are not to be trusted.
_MAX_STRETCH = 4.0


@torch.no_grad()
def tune_batch_norm(network: QuantizedNetwork, calibration: CalibrationSet) -> list[str]:
    """Re-estimate each folded BatchNorm's statistics on the quantized model and fold it again.

    A folded BatchNorm had the output mean ``beta`` and deviation ``gamma`` over the training set. In the order of execution, the
    quantized layer's outputs over the calibration set are measured, with all layers before it tuned already, and brought back to
    these: the bias takes the shift; the stretch goes into the per-channel weight scale, so that the integers stay as they are.
    Where there is no scale for each output channel (weights quantized per tensor, grouped transposed convolutions), only the shift is
    corrected.

    Args:
        network: Calibrated.
        calibration: The samples.

    Returns:
        Names of the layers tuned; empty if no BatchNorm was folded.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
    """
    if not network.calibrated:
        raise RuntimeError("BatchNorm tuning measures the quantized model: run Calibration first.")
    calibration.require()
    assert network.structure is not None
    folds = {fold.layer: fold for fold in network.folds if fold.layer in network.layers}
    order = [name for name in network.structure.calls_of if name in folds]
    replay = Replay(network.model, network.structure, calibration, order)
    for name in order:
        layer = network.layers[name]
        calls = replay.capture(name)
        norm = network.model.get_submodule(folds[name].normalization)
        assert isinstance(norm, FoldedBatchNorm)
        outputs = [layer.module(*call.args, **call.kwargs) for batch in calls for call in batch]
        _refold(layer, norm, *_channel_statistics(outputs))
        del outputs
        replay.finish(name, [[layer.module(*c.args, **c.kwargs) for c in batch] for batch in calls])
    return order


def _channel_statistics(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel (dimension 1) over all samples and positions."""
    count = sum(output.numel() // output.shape[1] for output in outputs)
    over = [0, *range(2, outputs[0].dim())]
    mean = sum((output.double().sum(over) for output in outputs), torch.zeros(())) / count
    shape = [1, -1, *[1] * (outputs[0].dim() - 2)]
    squares = sum(((output.double() - mean.view(shape)).square().sum(over) for output in outputs), torch.zeros(()))
    return mean.float(), (squares / count).sqrt().float()


def _refold(layer: QuantizedLayer, norm: FoldedBatchNorm, mean: Tensor, deviation: Tensor) -> None:
    stretch = torch.ones_like(mean)
    scale = layer.weight_quantizer.scale
    if layer.weight_quantizer.axis is not None and scale.shape == mean.shape:
        stretch = norm.deviation / deviation.clamp_min(1e-12)
        stretch = torch.where((norm.deviation > 0) & (deviation > 0), stretch, 1.0).clamp(1 / _MAX_STRETCH, _MAX_STRETCH)
        scale.mul_(stretch)
        layer.weight.mul_(stretch.view([-1 if d == layer.channel_axis else 1 for d in range(layer.weight.dim())]))
    assert layer.bias is not None
    layer.bias.copy_(norm.bias + (layer.bias - mean) * stretch)
