"""The error of each unit before and after AdaQuant."""

import math
from collections.abc import Sequence
from typing import Any

from ..quantization.spec import BitWidths
from ..reconstruction.optimize import UnitResult
from .chart import Chart, Series, over_layers
from .drawing import figure_over_layers
from .item import ReportItem

_TITLE = "Error of each unit before and after AdaQuant"

WHAT_ERROR_IS = (
    "The error of a unit is the squared difference of its output from the float model's, relative to the mean square "
    "of the float output, on calibration samples that were held out: 0 is exact, 1 as far off as an output of zeros."
)


def reconstruction_item(results: Sequence[UnitResult], candidate: BitWidths | None = None) -> ReportItem:
    """Relative error of each unit on held-out samples, before and after AdaQuant.

    Args:
        results: Results of the units, in the order of execution.
        candidate: Bit-widths of all units, where several are reconstructed for bit allocation; the item is then named
            by them.

    Example:
        >>> result = UnitResult("conv1", ("conv1",), 0.5, 0.25, True, "", 1.5)
        >>> item = reconstruction_item([result], BitWidths(4, 8))
        >>> item.name, item.title
        ('reconstruction_w4a8', 'Error of each unit before and after AdaQuant at W4A8')
        >>> item.rows
        [['conv1', 1, 0.5, 0.25, 1.5, 'kept']]
    """
    rows = [[r.name, len(r.layers), r.error_before, r.error_after, r.seconds, r.note or "kept"] for r in results]

    def draw() -> Any:
        names = [result.name for result in results]
        return draw_errors(names, [r.error_before for r in results], [r.error_after for r in results], "unit")

    columns = ["unit", "layers", "error before", "error after", "seconds in steps", "outcome"]

    def charts() -> list[Chart]:
        errors = [r.error_before for r in results], [r.error_after for r in results]
        return error_charts([r.name for r in results], *errors)

    name, title = "reconstruction", _TITLE
    if candidate is not None:
        name, title = f"{name}_{candidate.label.lower()}", f"{title} at {candidate.label}"
    return ReportItem(name, title, columns, rows, draw, charts=charts, note=WHAT_ERROR_IS)


def error_charts(
    names: Sequence[str], before: Sequence[float], after: Sequence[float], stage: str = "AdaQuant"
) -> list[Chart]:
    """Errors before and after a stage for the page; see ``draw_errors``.

    Args:
        names: Names of layers or units, in the order of execution.
        before: Relative error of each.
        after: The same afterwards.
        stage: What has changed the errors.

    Example:
        >>> error_charts(["conv1"], [0.5], [0.25])[0].series[1].label
        'after AdaQuant'
    """
    series = [
        Series(f"before {stage}", over_layers(before), "line"),
        Series(f"after {stage}", over_layers(after), "line"),
    ]
    return [Chart("Error, relative to the mean square of the output", series, names, log=True)]


def draw_errors(
    names: Sequence[str], before: Sequence[float], after: Sequence[float], what: str = "layer", stage: str = "AdaQuant"
) -> Any:
    """Draw errors before and after a stage on a logarithmic axis; what has none (NaN) is left out.

    Args:
        names: Names of layers or units, in the order of execution.
        before: Relative error of each.
        after: The same afterwards.
        what: What is named: ``"layer"`` or ``"unit"``.
        stage: What has changed the errors.

    Returns:
        A matplotlib figure.

    Example:
        >>> figure = draw_errors(["conv1", "conv2"], [0.5, float("nan")], [0.25, float("nan")])
        >>> [float(error) for error in figure.axes[0].lines[1].get_ydata()]
        [0.25]
    """
    figure, axes = figure_over_layers(names, 3.5, what)
    places = [place for place, error in enumerate(before) if math.isfinite(error)]
    for errors, marker, label in ((before, "o-", f"before {stage}"), (after, "s-", f"after {stage}")):
        axes.plot(places, [errors[place] for place in places], marker, label=label, markersize=4)
    if any(errors[place] > 0 for errors in (before, after) for place in places):
        axes.set_yscale("log")
    axes.set_ylabel("error / mean square of the output")
    figure.legend(loc="outside upper right", ncols=2)
    return figure
