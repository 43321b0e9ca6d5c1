"""What rounding does to the weight, the inputs and the output of each layer, alone quantized in the float model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import batch_size
from ..calibration.calibration_set import CalibrationSet
from ..network.hooks import real_inputs, real_output
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.parts import computing, quantized_weight
from ..quantization.spec import PerChannel, PerTensor
from .statistics import MOST_BITS, TensorObserver, TensorStatistics, effective_levels, outlier


@dataclass(frozen=True)
class LayerStatistics:
    """What rounding does to the tensors of a layer.

    Args:
        weight: Statistics of its weight; None where it has no quantized one of its own.
        inputs: Statistics of each of its inputs; None where it is in float, or did not run.
        output_error: Mean squared error of its output over the output's mean square; NaN if it did not run.
        output_bias: Share of that error, from 0 to 1, that the means of channels make.

    Example:
        See ``layer_statistics``.
    """

    weight: TensorStatistics | None
    inputs: tuple[TensorStatistics | None, ...]
    output_error: float
    output_bias: float


def layer_statistics(
    network: QuantizedNetwork, calibration: CalibrationSet, samples: int
) -> dict[str, LayerStatistics]:
    """Gather statistics of all layers in one pass of the float model, in which each layer runs quantized, too.

    Args:
        network: Calibrated network with its float weights.
        calibration: Calibration set.
        samples: Number of samples to look at, the first ones in whole batches.

    Returns:
        Statistics of each layer by its name.

    Example:
        See ``diagnose``, which names causes by them.
    """
    observers = {name: _LayerObserver(layer) for name, layer in network.layers.items()}
    hooks = [layer.module.register_forward_hook(observers[name], with_kwargs=True)
             for name, layer in network.layers.items()]  # fmt: skip
    try:
        with torch.no_grad(), network.quantized(False):
            seen = 0
            for index, batch in enumerate(calibration.batches):
                if seen < samples:
                    calibration.run(index)
                    seen += batch_size(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: observer.statistics() for name, observer in observers.items()}


class _LayerObserver:
    """Forward hook that runs the layer once more, quantized, and compares."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer, self.busy = layer, False
        operands, quantizers = layer.type.operands, layer.input_quantizers
        # The rows of a picture are no tokens.
        rows = not isinstance(layer.module, _CONVOLUTIONS)
        self.inputs = [
            None
            if quantizer is None
            else TensorObserver(quantizer, operand.channel_axis, rows and bool(operand.dynamic_range_axes))
            for operand, quantizer in zip(operands, quantizers, strict=True)
        ]
        self.squares = self.errors = 0.0
        self.count = 0
        self.sums: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            with computing(self.layer, weight=True, activations=True):
                rounded = module(*args, **kwargs)
        finally:
            self.busy = False
        for observer, value in zip(self.inputs, real_inputs(args, kwargs), strict=False):
            if observer is not None and value.numel():
                observer.update(value)
        self._compare(real_output(output), real_output(rounded))

    def _compare(self, wanted: Tensor | None, found: Tensor | None) -> None:
        if wanted is None or found is None or wanted.shape != found.shape or not wanted.numel():
            return
        # Channels of a convolution come second, of everything else last.
        axis = 1 if isinstance(self.layer.module, _CONVOLUTIONS) else wanted.dim() - 1
        difference = (found.float() - wanted.float()).movedim(axis, 0).flatten(1)
        sums = difference.sum(1, dtype=torch.float64)
        self.sums = sums if self.sums is None or self.sums.shape != sums.shape else self.sums + sums
        self.count += difference.shape[1]
        self.squares += float(wanted.float().square().sum(dtype=torch.float64))
        self.errors += float(difference.square().sum(dtype=torch.float64))

    def statistics(self) -> LayerStatistics:
        error, bias = float("nan"), 0.0
        if self.count and self.sums is not None:
            error = self.errors / max(self.squares, 1e-30)
            bias = float(self.sums.square().sum()) / self.count / self.errors if self.errors else 0.0
        inputs = tuple(None if observer is None else observer.statistics() for observer in self.inputs)
        return LayerStatistics(_weight_statistics(self.layer), inputs, error, bias)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _weight_statistics(layer: QuantizedLayer) -> TensorStatistics | None:
    """Statistics of a weight; levels are counted channel by channel, and their median is given."""
    found = quantized_weight(layer)
    if found is None or layer.weight_quantizer is None:
        return None
    quantizer, spec, axis = layer.weight_quantizer, layer.weight_quantizer.spec, layer.channel_axis
    rows, rounded = (tensor.float().movedim(axis, 0).flatten(1) for tensor in found)
    squared = (rounded - rows).square()
    clipped = used = levels = float("nan")
    if isinstance(spec.granularity, PerTensor | PerChannel):
        low, high = (end.view(-1, 1).to(rows) for end in quantizer.range())
        slack = (high - low) / (2 * (spec.qmax - spec.qmin))
        outside = (rows < low - slack) | (rows > high + slack)
        clipped = float(squared[outside].sum() / squared.sum().clamp_min(1e-30))
        ends = torch.minimum(rows.amax(1, keepdim=True), high) - torch.maximum(rows.amin(1, keepdim=True), low)
        used = float((ends / (high - low).clamp_min(1e-30)).clamp(0, 1).median())
    if spec.bits <= MOST_BITS:
        integers = layer.integer_weight().movedim(axis, 0).flatten(1).long() - spec.qmin
        counts = torch.zeros(len(rows), spec.qmax - spec.qmin + 1, device=rows.device)
        counts.scatter_add_(1, integers, torch.ones((), device=rows.device).expand_as(integers))
        levels = float(effective_levels(counts).median())
    magnitudes = rows.abs().amax(1)
    channel = outlier(magnitudes) if isinstance(spec.granularity, PerTensor) else None
    error = float(squared.mean() / rows.square().mean().clamp_min(1e-30))
    return TensorStatistics(error, clipped, used, levels, spec.qmax - spec.qmin + 1, channel)
