"""What equalization chose for each input, and what it gained."""

from collections.abc import Sequence
from typing import Any

from ..reconstruction.equalize import EqualizedInput
from .chart import Chart
from .item import ReportItem
from .reconstruction import draw_errors, error_charts

_NOTE = (
    "The error is the squared difference of the outputs of the layers that read an input from the float ones, relative "
    "to the mean square of the float outputs, on samples that were held out. Channels are divided by their range to "
    "the power of the exponent."
)


def equalization_item(inputs: Sequence[EqualizedInput]) -> ReportItem:
    """Exponent of each input, who takes its ratios in, and the error of its layers before and after.

    Args:
        inputs: What was found for each input, in the order of execution.

    Example:
        >>> item = equalization_item([EqualizedInput("conv2 input", ("conv2",), "conv1", 0.5, 0.25, 0.125)])
        >>> item.rows
        [['conv2 input', 'conv2', 'divided by conv1', 0.5, 0.25, 0.125]]
    """
    rows = [
        [
            found.name,
            ", ".join(found.layers),
            _how(found),
            found.exponent,
            found.error_before,
            found.error_after,
        ]
        for found in inputs
    ]

    def draw() -> Any:
        before, after = [found.error_before for found in inputs], [found.error_after for found in inputs]
        return draw_errors([found.name for found in inputs], before, after, "input", "equalization")

    columns = ["input", "read by", "how", "exponent", "error before", "error after"]

    def charts() -> list[Chart]:
        before, after = [found.error_before for found in inputs], [found.error_after for found in inputs]
        return error_charts([found.name for found in inputs], before, after, "equalization")

    return ReportItem("equalization", "Equalization of inputs", columns, rows, draw, charts=charts, note=_NOTE)


def _how(found: EqualizedInput) -> str:
    if not found.exponent:
        return "not equalized"
    return f"divided by {found.absorbed_by}" if found.absorbed_by else "divided before it is quantized"
