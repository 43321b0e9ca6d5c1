"""Histograms of weights and activations with their ranges, for the layers that lose most."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.tensors import ObservedTensor
from ..quantization.observers import HistogramObserver
from ..quantization.quantizers import Quantizer
from ..quantization.spec import PerGroup, PerTensor
from .chart import Chart, Series
from .drawing import plain_text
from .item import ReportItem

# Bars of a histogram in pictures and in charts.
_BARS, _BARS_OF_CHARTS = 120, 60


def histograms_item(network: QuantizedNetwork, layers: int = 6) -> ReportItem:
    """Weights and inputs of the layers that lose most.

    An activation that several of the layers read in the same format is shown once, with its readers.

    Args:
        network: A calibrated network. Histograms of activations are those that the observers have kept (``"mse"``,
            ``"percentile"``, ``"lp"``).
        layers: How many layers to show: those of the greatest relative error after reconstruction (of their units), or,
            where nothing was reconstructed, of the greatest error that rounding makes in the weight.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> item = histograms_item(QuantizedNetwork(nn.Sequential(nn.Linear(2, 3)), QuantizationScheme()))
        >>> item.title, item.rows
        ('Weights and inputs of the layers that lose most', [])
    """
    worst = sorted(network.layers.values(), key=_loss, reverse=True)[:layers]
    shown = [_Shown(layer, activations) for layer, activations in zip(worst, _activations(network, worst), strict=True)]
    rows = [row for layer in shown for row in _rows(layer)]
    # Outputs get a column of pictures only if there is one that is quantized.
    columns_drawn = 3 if any(activation.is_output for layer in shown for activation in layer.activations) else 2

    def draw() -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.5 * columns_drawn, 2.2 * max(1, len(shown))), layout="constrained")
        axes = figure.subplots(max(1, len(shown)), columns_drawn, squeeze=False)
        for line, layer in zip(axes, shown, strict=False):
            _draw_weight(line[0], layer.layer)
            name, inputs = layer.layer.name, [a for a in layer.activations if not a.is_output]
            above = ", shown above" if layer.layer.tensors and not inputs else ""
            _draw_activations(line[1], f"{name}: input{above}", inputs)
            for place in line[2:]:
                _draw_activations(place, f"{name}: output", [a for a in layer.activations if a.is_output])
        return figure

    columns = ["layer", "tensor", "bits", "least", "greatest", "range from", "range to"]
    return ReportItem(
        "histograms",
        "Weights and inputs of the layers that lose most",
        columns,
        rows,
        draw,
        charts=lambda: [chart for layer in shown for chart in _charts(layer)],
        note="Dashed lines are the ends of the quantizer's range; of several ranges, those of the widest.",
    )


@dataclass(frozen=True)
class _Activation:
    """An activation in one format; ``quantizer`` is None where it stays in float."""

    tensor: ObservedTensor
    quantizer: Quantizer | None
    readers: tuple[str, ...]
    is_output: bool = False

    @property
    def description(self) -> str:
        """What it is to the layer that it is named after, and who else reads it."""
        name = self.tensor.name
        for reader in self.tensor.readers:
            name = name.removeprefix(f"{reader} ")
        return f"{name} (read by {', '.join(self.readers)})" if len(self.readers) > 1 else name

    @property
    def histogram(self) -> tuple[Tensor, float, float] | None:
        """Counts over ``[-reach, reach]`` with the reach first, least and greatest value, if they were kept."""
        observer = self.tensor.observer
        if not isinstance(observer, HistogramObserver) or not observer.seen:
            return None
        row = observer.row.detach().cpu()
        return torch.cat([row[:1], row[3:]]), float(row[1]), float(row[2])


@dataclass(frozen=True)
class _Shown:
    """A layer, and those of its activations that no layer above it shows."""

    layer: QuantizedLayer
    activations: list[_Activation]


def _activations(network: QuantizedNetwork, layers: Sequence[QuantizedLayer]) -> Iterator[list[_Activation]]:
    """For each layer its activations, without those that a layer before has."""
    seen: set[tuple[int, int]] = set()
    for layer in layers:
        found = []
        for tensor, quantizer in zip(layer.tensors, layer.input_quantizers, strict=True):
            if (id(tensor), id(quantizer)) not in seen:
                seen.add((id(tensor), id(quantizer)))
                found.append(_Activation(tensor, quantizer, _readers(network, tensor, quantizer)))
        if layer.output_quantizer is not None:
            found.append(_Activation(layer.output_tensor, layer.output_quantizer, (layer.name,), is_output=True))
        yield found


def _readers(network: QuantizedNetwork, tensor: ObservedTensor, quantizer: Quantizer | None) -> tuple[str, ...]:
    """Names of the layers that read an activation in the same format."""
    layers = (network.layers[name] for name in tensor.readers if name in network.layers)
    return tuple(
        layer.name
        for layer in layers
        if any(t is tensor and q is quantizer for t, q in zip(layer.tensors, layer.input_quantizers, strict=True))
    )


def _loss(layer: QuantizedLayer) -> float:
    if layer.errors is not None and math.isfinite(layer.errors[1]):
        return layer.errors[1]
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return -1.0
    weight = layer.weight.detach()
    rounded = quantizer.decode(layer.integer_weight()).to(weight.dtype)
    return float((rounded - weight).square().mean() / weight.square().mean().clamp_min(1e-30))


def _range(quantizer: Quantizer | None) -> tuple[float, float] | None:
    """The widest range of any channel or group; None where there is none that is fixed."""
    if quantizer is None or quantizer.spec.dynamic:
        return None
    low, high = quantizer.range()
    return float(low.min()), float(high.max())


def _rows(shown: _Shown) -> Iterator[list[Any]]:
    layer, nothing = shown.layer, (None, None)
    weight, quantizer = layer.weight.detach(), layer.weight_quantizer
    if weight.numel():
        what, bits = "weight", None
        if quantizer is not None:
            bits, granularity = quantizer.spec.bits, quantizer.spec.granularity
            what = f"weight in groups of {granularity.size}" if isinstance(granularity, PerGroup) else what
        extent = float(weight.min()), float(weight.max())
        yield [layer.name, what, bits, *extent, *(_range(quantizer) or nothing)]
    for activation in shown.activations:
        histogram = activation.histogram
        bits = activation.quantizer.spec.bits if activation.quantizer is not None else None
        seen = histogram[1:] if histogram is not None else nothing
        yield [layer.name, activation.description, bits, *seen, *(_range(activation.quantizer) or nothing)]


def _charts(shown: _Shown) -> Iterator[Chart]:
    layer = shown.layer
    weight = layer.weight.detach().float().flatten().cpu()
    if weight.numel():
        low, high = float(weight.min()), float(weight.max())
        counts = torch.histc(weight, _BARS_OF_CHARTS, low, high)
        ends = torch.linspace(low, high, _BARS_OF_CHARTS + 1) if low < high else torch.tensor([low - 0.5, low + 0.5])
        if low == high:
            counts = counts.sum().view(1)
        yield _histogram_chart(
            f"{layer.name}: number of weights by value", counts, ends, _range(layer.weight_quantizer)
        )
    for activation in shown.activations:
        if activation.histogram is not None:
            counts, ends = _merged(*activation.histogram, _BARS_OF_CHARTS)
            title = f"{layer.name}: number of values of its {activation.description}"
            yield _histogram_chart(title, counts, ends, _range(activation.quantizer))


def _histogram_chart(title: str, counts: Tensor, ends: Tensor, limits: tuple[float, float] | None) -> Chart:
    points = list(zip(ends.tolist(), [*counts.tolist(), 0.0], strict=True))
    return Chart(title, [Series("", points, "area")], log=True, marks=limits or (), mark_label="range")


def _merged(kept: Tensor, low: float, high: float, bars: int) -> tuple[Tensor, Tensor]:
    """Counts of an activation over about so many bars between its least and greatest value, and the bars' ends.

    Args:
        kept: The reach, and the counts over ``[-reach, reach]``.
        low: Least value.
        high: Greatest value.
        bars: Number of bars.
    """
    reach, counts = float(kept[0]), kept[1:]
    step = len(counts)
    # Ever finer, until enough of the bars are in use.
    while step % 2 == 0 and (high - low) / (2 * reach) * len(counts) / step < bars / 2:
        step //= 2
    places = torch.linspace(-reach, reach, len(counts) + 1)[::step]
    used = (places[1:] >= low) & (places[:-1] <= high)
    return counts.view(-1, step).sum(1)[used], torch.cat([places[:-1][used], places[1:][used][-1:]])


def _draw_weight(axes: Any, layer: QuantizedLayer) -> None:
    axes.set_title(f"{plain_text(layer.name)}: weight", fontsize=8)
    weight, quantizer = layer.weight.detach(), layer.weight_quantizer
    if not weight.numel():
        axes.set_axis_off()
        return
    axes.hist(weight.float().flatten().cpu().numpy(), bins=_BARS, log=True)
    if (ends := _range(quantizer)) is not None and quantizer is not None:
        granularity = quantizer.spec.granularity
        rows = "group" if isinstance(granularity, PerGroup) else "channel"
        _mark(axes, *ends, "range" if isinstance(granularity, PerTensor) else f"range of the widest {rows}")
    _label(axes, "number of weights")


def _draw_activations(axes: Any, title: str, activations: Sequence[_Activation]) -> None:
    others = max((len(activation.readers) - 1 for activation in activations), default=0)
    also = f", also of {others} other layer{'s' if others > 1 else ''}" if others > 0 else ""
    axes.set_title(f"{plain_text(title)}{also}", fontsize=8)
    drawn = [activation for activation in activations if activation.histogram is not None]
    if not drawn:
        axes.set_axis_off()
        return
    for activation in drawn:
        assert activation.histogram is not None
        counts, ends = _merged(*activation.histogram, _BARS)
        axes.stairs(counts.numpy(), ends.numpy(), fill=True, alpha=0.7)
        if (limits := _range(activation.quantizer)) is not None:
            _mark(axes, *limits, "range")
    axes.set_yscale("log")
    _label(axes, "number of values")


def _mark(axes: Any, low: float, high: float, label: str) -> None:
    for place, name in ((low, label), (high, None)):
        axes.axvline(place, color="C3", linestyle="--", linewidth=1, label=name)
    axes.legend(fontsize=6, loc="upper right")


def _label(axes: Any, what: str) -> None:
    axes.tick_params(labelsize=6, which="both")
    axes.set_xlabel("value", fontsize=7)
    axes.set_ylabel(what, fontsize=7)
