"""Charts of the page: described by plain values, drawn by its template as SVG that needs no matplotlib.

Horizontal places are shares of the width in per cent, so that a chart is as wide as its column while its text keeps its
size; vertical ones are pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from .numbers import short

# Height of the plot, room above and below its values, width of a layer, and width of a letter of a name, in pixels.
HEIGHT, _PADDING, _LAYER, _LETTER = 180, 10, 16, 7

# Letters that are shown of a name, and of the parts of one that is longer.
_LONGEST, _OF_PART = 26, 3

# Powers of ten of a logarithmic axis at most.
_DECADES = 7


@dataclass(frozen=True)
class Series:
    """Some values of a chart that belong together.

    Args:
        label: Name in the legend; ``""`` for none.
        points: Pairs of x and y; of a chart over layers, x is the position of the layer. Values that are not finite are
            left out.
        style: ``"bars"``, ``"area"`` (bars without gaps, each as wide as the way to the next one), ``"line"``,
            ``"dashed"`` or ``"points"``.
        names: Name of each point, written beside it.

    Example:
        >>> Series("before", [(0, 0.5), (1, math.nan)], "line").finite
        [(0, 0.5)]
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: Literal["bars", "area", "line", "dashed", "points"]
    names: Sequence[str] = ()

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Chart:
    """A chart over layers, or over numbers.

    Args:
        title: What is drawn, with its unit.
        series: Its values.
        layers: Names of the layers (or whatever else has names) along the x axis; none for an axis of numbers.
        x_label: What the numbers of the x axis are.
        log: Whether the y axis is logarithmic. What is not positive then lies at its bottom.
        from_zero: Whether a linear y axis begins at 0.
        marks: Places on the x axis that get a dashed line.
        mark_label: What these are.

    Example:
        >>> chart = Chart("bit-width", [Series("weights", [(0, 4), (1, 8)], "bars")], ["conv1", "fc"], from_zero=True)
        >>> [chart.x(x) for x, _ in chart.series[0].points], [text for _, text in chart.y_ticks]
        ([25.0, 75.0], ['0', '2', '4', '6', '8'])
    """

    title: str
    series: Sequence[Series]
    layers: Sequence[str] = ()
    x_label: str = ""
    log: bool = False
    from_zero: bool = False
    marks: Sequence[float] = ()
    mark_label: str = ""

    @cached_property
    def _x_limits(self) -> tuple[float, float]:
        if self.layers:
            return -0.5, len(self.layers) - 0.5
        values = [x for series in self.series for x, _ in series.finite] + list(self.marks)
        return _widened(min(values, default=0.0), max(values, default=1.0), 0.06)

    @cached_property
    def _y_limits(self) -> tuple[float, float]:
        """Least and greatest value; of a logarithmic axis their exponents."""
        values = [y for series in self.series for _, y in series.finite]
        if self.log:
            exponents = [math.log10(value) for value in values if value > 0] or [0.0]
            high = float(math.ceil(max(exponents)))
            low = max(math.floor(min(exponents)), high - _DECADES)
            # The least bar of a histogram must be seen.
            has_bars = any(series.style == "area" for series in self.series)
            return low - (0.3 if has_bars else float(low == high)), high
        low, high = min(values, default=0.0), max(values, default=1.0)
        return (min(low, 0.0), max(high, 0.0) or 1.0) if self.from_zero else _widened(low, high, 0.1)

    def x(self, value: float) -> float:
        """Horizontal place of a value, in per cent."""
        low, high = self._x_limits
        return round(100 * (value - low) / (high - low), 3)

    def y(self, value: float) -> float:
        """Vertical place of a value, in pixels from the top."""
        low, high = self._y_limits
        if self.log:
            value = math.log10(value) if value > 0 else low
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(HEIGHT - _PADDING - share * (HEIGHT - 2 * _PADDING), 1)

    @property
    def bottom(self) -> float:
        """Where bars begin, in pixels from the top."""
        return self.y(0.0) if self.from_zero or self.log else HEIGHT - _PADDING

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Places and texts along the y axis."""
        low, high = self._y_limits
        if not self.log:
            return [(self.y(value), short(value)) for value in _ticks(low, high, 4)]
        step = math.ceil((high - low) / 4)
        return [(self.y(10.0**power), short(10.0**power)) for power in range(round(high), round(low) - 1, -step)]

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Places and texts along an axis of numbers."""
        return [(self.x(value), short(value)) for value in _ticks(*self._x_limits, 4)]

    @property
    def layer_labels(self) -> list[str]:
        """Names of the layers; of the long ones, as many of the first parts as must be are cut short."""
        return [_shortened(name) for name in self.layers]

    @property
    def upright(self) -> bool:
        """Whether names are so short that they need not be turned."""
        return max(map(len, self.layers), default=0) <= 2

    @property
    def height(self) -> int:
        """Height with the labels of the x axis, in pixels."""
        if not self.layers or self.upright:
            return HEIGHT + 20
        return HEIGHT + 10 + _LETTER * max(map(len, self.layer_labels))

    @property
    def least_width(self) -> int:
        """Width below which the chart scrolls, in pixels."""
        return _LAYER * len(self.layers)

    def polyline(self, series: Series) -> str:
        """Points of a line in a box that is 100 wide."""
        return " ".join(f"{self.x(x):g},{self.y(y):g}" for x, y in series.finite)

    def outline(self, series: Series) -> str:
        """Path of an area in a box that is 100 wide; the last point only says where the last bar ends."""
        points = series.finite
        steps = [f"V{self.y(y):g}H{self.x(end):g}" for (_, y), (end, _) in pairwise(points)]
        return f"M{self.x(points[0][0]):g},{self.bottom:g}{''.join(steps)}V{self.bottom:g}z" if steps else ""


def over_layers(values: Sequence[float | None]) -> list[tuple[float, float]]:
    """Points of a series over layers.

    Args:
        values: Value of each layer; None where there is none.

    Example:
        >>> over_layers([4.0, None, 8.0])
        [(0, 4.0), (2, 8.0)]
    """
    return [(place, value) for place, value in enumerate(values) if value is not None]


def _shortened(name: str) -> str:
    parts = name.split(".")
    for place in range(len(parts) - 1):
        if len(".".join(parts)) > _LONGEST:
            parts[place] = parts[place][:_OF_PART]
    joined = ".".join(parts)
    return joined if len(joined) <= _LONGEST else f"…{joined[1 - _LONGEST :]}"


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """Limits with some room at both ends, and not the same."""
    room = (high - low) * share or (abs(high) * 0.1 or 1.0) * (low == high)
    return low - room, high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers from ``low`` to ``high``."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= (high - low) * 0.999)
    places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [round(place * step, 12) for place in places]
