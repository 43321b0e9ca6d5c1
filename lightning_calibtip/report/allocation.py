"""What a bit allocation has found: bit-widths over depth, sensitivities, and the trade-off of size and loss."""

import math
from collections.abc import Sequence
from typing import Any

from ..allocation.outcome import Allocation, Point
from ..quantization.spec import BitWidths
from .chart import Chart, Series, over_layers
from .drawing import figure_over_layers
from .item import ReportItem
from .layers import bit_width_charts, draw_bit_widths

_NOTE_ON_RISES = "Where the loss does not rise, the point lies at the bottom."


def allocation_items(allocation: Allocation) -> list[ReportItem]:
    """Bit-widths of each layer and sensitivities; the trade-off too, if several budgets were solved.

    Args:
        allocation: Outcome of the allocation.

    Example:
        >>> from lightning_calibtip.allocation.outcome import Point
        >>> from lightning_calibtip.allocation.table import Conditions, SensitivityTable
        >>> base, small = BitWidths(8, 8), BitWidths(4, 8)
        >>> table = SensitivityTable(Conditions("model", "states", "kl", 8, base), 0.5, {"conv1": {small: 0.75}})
        >>> point = Point("0.13", {"conv1": small}, 0.125, 0.25, 0.25, {"compression": 0.125})
        >>> bit_widths, sensitivity = allocation_items(Allocation(point, [point], [], table))
        >>> bit_widths.title, bit_widths.rows
        ('Bit-widths chosen', [['conv1', 4, 8, 0.25]])
        >>> sensitivity.columns, sensitivity.rows
        (['layer', 'W4A8'], [['conv1', 0.25]])
    """
    items = [_bit_widths_item(allocation), _sensitivity_item(allocation)]
    return [*items, _trade_off_item(allocation)] if allocation.uniform else items


def _bit_widths_item(allocation: Allocation) -> ReportItem:
    chosen = allocation.chosen.bits
    rows = [[name, bits.weight, bits.activation, _rise(allocation, name, bits)] for name, bits in chosen.items()]

    def draw() -> Any:
        return draw_bit_widths(chosen)

    columns = ["layer", "weight bits", "activation bits", "rise of the loss alone"]
    return ReportItem("allocation", "Bit-widths chosen", columns, rows, draw, charts=lambda: bit_width_charts(chosen))


def _sensitivity_item(allocation: Allocation) -> ReportItem:
    names = list(allocation.chosen.bits)
    table = allocation.sensitivity
    measured = {bits for of_layer in table.losses.values() for bits in of_layer}
    candidates = sorted(measured, key=lambda bits: bits.sort_key)
    rows = [[name, *(_rise(allocation, name, bits) for bits in candidates)] for name in names]

    def draw() -> Any:
        from matplotlib.colors import LogNorm

        figure, axes = figure_over_layers(names, 2.0 + 0.3 * len(candidates))
        rises = [[_rise(allocation, name, bits) for name in names] for bits in candidates]
        known = [abs(rise) for line in rises for rise in line if rise]
        # A rise of nothing, or a fall, takes the color of the smallest.
        least, most = max(min(known, default=1e-3), max(known, default=1.0) * 1e-5), max(known, default=1.0)
        values = [[float("nan") if rise is None else max(rise, least) for rise in line] for line in rises]
        image = axes.imshow(values, aspect="auto", norm=LogNorm(least, max(most, least * 1.01)), cmap="viridis")
        axes.set_yticks(range(len(candidates)), [bits.label for bits in candidates])
        figure.colorbar(image, ax=axes)
        axes.set_title(f"Rise of the {_loss_name(allocation.sensitivity.conditions.metric)}", fontsize=10)
        axes.set_ylabel("bit-widths of this layer alone")
        return figure

    columns = ["layer", *(bits.label for bits in candidates)]

    def charts() -> list[Chart]:
        name = _loss_name(allocation.sensitivity.conditions.metric)
        title = f"Rise of the {name} with this layer alone at these bit-widths"
        of_candidates = [[_rise(allocation, name, bits) for name in names] for bits in candidates]
        series = [
            Series(bits.label, over_layers(rises), "points")
            for bits, rises in zip(candidates, of_candidates, strict=True)
        ]
        return [Chart(title, series, names, log=True)]

    return ReportItem(
        "sensitivity", "Sensitivity of each layer", columns, rows, draw, table.write, charts, _NOTE_ON_RISES
    )


def _trade_off_item(allocation: Allocation) -> ReportItem:
    points = [*((point, "mixed") for point in allocation.curve), *((point, "uniform") for point in allocation.uniform)]
    metrics = list(allocation.chosen.metrics)
    columns = ["model", "kind", "compression", "predicted loss", "measured loss", *metrics]
    rows = [
        [p.label, kind, p.compression, p.predicted_loss, p.measured_loss, *(p.metrics.get(name) for name in metrics)]
        for p, kind in points
    ]

    def draw() -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 3.6 + 2.6 * len(metrics)), layout="constrained")
        losses, *others = figure.subplots(1 + len(metrics), sharex=True, squeeze=False)[:, 0]
        curve = sorted(allocation.curve, key=lambda point: point.compression)
        sizes = [point.compression for point in curve]
        if not math.isnan(allocation.chosen.predicted_loss):
            losses.plot(sizes, [point.predicted_loss for point in curve], ":", color="C0", label="mixed, predicted")
        losses.plot(sizes, [point.measured_loss for point in curve], "o-", color="C0", label="mixed, measured")
        _uniform_points(losses, allocation.uniform, [point.measured_loss for point in allocation.uniform])
        chosen = allocation.chosen
        losses.plot(chosen.compression, chosen.measured_loss, "*", color="C3", markersize=12, label="chosen")
        losses.set_yscale("symlog", linthresh=1e-3)
        losses.margins(x=0.1, y=0.1)
        losses.set_ylabel(f"rise of the {_loss_name(allocation.metric or allocation.sensitivity.conditions.metric)}")
        for axes, name in zip(others, metrics, strict=True):
            axes.plot(sizes, [point.metrics[name] for point in curve], "o-", color="C0")
            _uniform_points(axes, allocation.uniform, [point.metrics[name] for point in allocation.uniform])
            axes.set_ylabel(name)
            axes.margins(y=0.1)
        (others or [losses])[-1].set_xlabel("size of the weights (share of float32)")
        figure.legend(loc="outside upper center", ncols=4, fontsize=9)
        return figure

    return ReportItem(
        "trade_off", "Trade-off of size and loss", columns, rows, draw, charts=lambda: _trade_off_charts(allocation)
    )


def _trade_off_charts(allocation: Allocation) -> list[Chart]:
    curve = sorted(allocation.curve, key=lambda point: point.compression)
    labels = [point.label for point in allocation.uniform]
    charts = []
    for name in (None, *allocation.chosen.metrics):

        def points(of: Sequence[Point], name: str | None = name) -> list[tuple[float, float]]:
            return [(p.compression, p.measured_loss if name is None else p.metrics[name]) for p in of]

        series = [
            Series("mixed", points(curve), "line"),
            Series("uniform bit-widths", points(allocation.uniform), "points", labels),
            Series("chosen", points([allocation.chosen]), "points"),
        ]
        if name is None and not math.isnan(allocation.chosen.predicted_loss):
            series.append(Series("mixed, predicted", [(p.compression, p.predicted_loss) for p in curve], "dashed"))
        measured = allocation.metric or allocation.sensitivity.conditions.metric
        title = name or f"Rise of the {_loss_name(measured)}"
        charts.append(Chart(title, series, x_label="size of the weights (share of float32)", log=name is None))
    return charts


def _uniform_points(axes: Any, points: Sequence[Point], heights: Sequence[float]) -> None:
    label = "uniform bit-widths" if not axes.get_subplotspec().rowspan.start else None
    axes.plot([point.compression for point in points], heights, "s", color="C1", label=label)
    for point, height in zip(points, heights, strict=True):
        axes.annotate(point.label, (point.compression, height), (4, 4), textcoords="offset points", fontsize=7)


def _loss_name(metric: str) -> str:
    return {"kl": "KL divergence (nats)", "mse": "relative squared error"}.get(metric, f"loss ({metric})")


def _rise(allocation: Allocation, name: str, bits: BitWidths) -> float | None:
    table = allocation.sensitivity
    known = bits == table.conditions.base or bits in table.losses.get(name, {})
    return table.rise(name, bits) if known else None
