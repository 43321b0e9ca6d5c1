"""Histograms of weights and activations with their ranges, of the layers that lose most."""

import math
from typing import Any

import torch
from torch import Tensor

from ..quantization.affine import dequantize
from ..quantization.layers import QuantizedLayer
from ..quantization.network import QuantizedNetwork
from ..quantization.observers import HistogramObserver
from ..quantization.quantizer import Quantizer
from .drawing import plain_text
from .exhibit import Exhibit

# Bars of a histogram.
_BARS = 120


def histograms_exhibit(network: QuantizedNetwork, layers: int = 6) -> Exhibit:
    """Weights and inputs of the worst layers.

    Args:
        network: Calibrated. Histograms of activations are those that the observers kept (``"mse"``, ``"percentile"``,
            ``"lp"``).
        layers: How many to show: those of the greatest relative error after reconstruction (of its unit), or, where
            nothing was reconstructed, of the greatest error that rounding makes in the weight.
    """
    worst = sorted(network.layers.values(), key=_loss, reverse=True)[:layers]
    rows = [row for layer in worst for row in _rows(layer)]

    def draw() -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 2.2 * max(1, len(worst))), layout="constrained")
        axes = figure.subplots(max(1, len(worst)), 2, squeeze=False)
        for line, layer in zip(axes, worst, strict=False):
            _draw_weight(line[0], layer)
            _draw_input(line[1], layer)
        return figure

    columns = ["layer", "tensor", "bits", "least", "greatest", "range from", "range to"]
    return Exhibit("histograms", columns, rows, draw)


def _loss(layer: QuantizedLayer) -> float:
    if layer.errors is not None and math.isfinite(layer.errors[1]):
        return layer.errors[1]
    on = layer.weight_quantizer
    if on is None:
        return -1.0
    weight = layer.weight.detach()
    rounded = dequantize(layer.integer_weight(), on.scale.detach(), on.zero_point.detach(), on.axis)
    return float((rounded - weight).square().mean() / weight.square().mean().clamp_min(1e-30))


def _range(quantizer: Quantizer) -> tuple[float, float]:
    """The widest range of any channel."""
    low = (quantizer.qmin - quantizer.zero_point.detach().round()) * quantizer.scale.detach()
    high = (quantizer.qmax - quantizer.zero_point.detach().round()) * quantizer.scale.detach()
    return float(low.min()), float(high.max())


def _rows(layer: QuantizedLayer) -> list[list[Any]]:
    rows: list[list[Any]] = []
    if layer.weight_quantizer is not None:
        weight = layer.weight.detach()
        extent = float(weight.min()), float(weight.max())
        rows.append([layer.name, "weight", layer.bits[0], *extent, *_range(layer.weight_quantizer)])
    for quantizer in layer.inputs:
        seen = _histogram(quantizer)
        extent = (seen[1], seen[2]) if seen else (None, None)  # type: ignore[assignment]
        ends: tuple[Any, Any] = (None, None) if quantizer.dynamic else _range(quantizer)
        rows.append([layer.name, quantizer.name.removeprefix(f"{layer.name} "), layer.bits[1], *extent, *ends])
    return rows


def _histogram(quantizer: Quantizer) -> tuple[Tensor, float, float] | None:
    """Counts over ``[-reach, reach]`` with the reach first, least and greatest value, if they were kept."""
    observer = quantizer.observer
    if not isinstance(observer, HistogramObserver) or not observer.seen:
        return None
    row = observer.row.detach().cpu()
    return torch.cat([row[:1], row[3:]]), float(row[1]), float(row[2])


def _draw_weight(axes: Any, layer: QuantizedLayer) -> None:
    axes.set_title(f"{plain_text(layer.name)}: weight", fontsize=8)
    if layer.weight_quantizer is None:
        axes.set_axis_off()
        return
    axes.hist(layer.weight.detach().float().flatten().cpu().numpy(), bins=_BARS, log=True)
    label = "range" if layer.weight_quantizer.axis is None else "range of the widest channel"
    _mark(axes, *_range(layer.weight_quantizer), label)
    axes.set_ylabel("number of weights", fontsize=7)


def _draw_input(axes: Any, layer: QuantizedLayer) -> None:
    axes.set_title(f"{plain_text(layer.name)}: input", fontsize=8)
    shown = False
    for quantizer in layer.inputs:
        seen = _histogram(quantizer)
        if seen is None:
            continue
        shown = True
        counts, low, high = seen[0][1:], seen[1], seen[2]
        edges = torch.linspace(-float(seen[0][0]), float(seen[0][0]), len(counts) + 1)
        step = len(counts) // 1024
        merged, places = counts.view(-1, step).sum(1), edges[::step]
        used = (places[1:] >= low) & (places[:-1] <= high)
        ends = torch.cat([places[:-1][used], places[1:][used][-1:]])
        axes.stairs(merged[used].numpy(), ends.numpy(), fill=True, alpha=0.7)
        if not quantizer.dynamic:
            _mark(axes, *_range(quantizer), "range")
    if not shown:
        axes.set_axis_off()
        return
    axes.set_yscale("log")
    axes.set_ylabel("number of values", fontsize=7)


def _mark(axes: Any, low: float, high: float, label: str) -> None:
    for place, name in ((low, label), (high, None)):
        axes.axvline(place, color="C3", linestyle="--", linewidth=1, label=name)
    axes.legend(fontsize=6, loc="upper right")
    axes.tick_params(labelsize=6, which="both")
    axes.set_xlabel("value", fontsize=7)
