"""Figures of a run as matplotlib objects (the ``recipes`` extra installs it); records come from ``report.record``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from .reconstruction import draw_errors


def stage_figure(records: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the metric after each stage, one group of bars for each run.

    Args:
        records: Records of runs by label (``"W4A4"``). All must have the same metric.

    Example:
        >>> record = {"metric": "top1", "float": 0.9, "stages": [{"name": "Calibration", "metric": 0.8}]}
        >>> len(stage_figure({"W4A4": record}).axes[0].patches)
        2
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = ["float"]
    for record in records.values():
        labels += [stage["name"] for stage in record["stages"] if stage["name"] not in labels]
    width = 0.8 / max(1, len(records))
    for group, (label, record) in enumerate(records.items()):
        values = {"float": record["float"], **{stage["name"]: stage["metric"] for stage in record["stages"]}}
        places = [i + (group - (len(records) - 1) / 2) * width for i, name in enumerate(labels) if name in values]
        heights = [values[name] for name in labels if name in values]
        axes.bar_label(axes.bar(places, heights, width, label=label), fmt="%.3f", fontsize=7)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(f"{next(iter(records.values()))['metric']} (fraction)")
    axes.set_ylim(0, 1.08)
    axes.set_xlabel("after stage")
    figure.legend(loc="outside upper right", ncols=len(records))
    return figure


def layer_error_figure(record: Mapping[str, Any]) -> Figure:
    """Draw the relative output error of each layer before and after reconstruction, on a logarithmic axis.

    Args:
        record: Record of a run.

    Raises:
        ValueError: If no layer of the record was reconstructed.

    Example:
        >>> layers = [{"name": "conv1", "error_before": 0.5, "error_after": 0.25}]
        >>> len(layer_error_figure({"layers": layers}).axes[0].lines)
        2
    """
    layers = [layer for layer in record["layers"] if layer["error_before"] is not None]
    if not layers:
        raise ValueError("The record has no reconstructed layer: run a pipeline with AdaQuant.")
    names = [layer["name"] for layer in layers]
    figure: Figure = draw_errors(
        names, [layer["error_before"] for layer in layers], [layer["error_after"] for layer in layers]
    )
    return figure
