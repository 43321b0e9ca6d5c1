"""Report items: one subject of a run as a table, and as a figure for those who have matplotlib."""

import csv
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically
from ..files.cells import inert
from .chart import Chart
from .table import text_table

log = logging.getLogger(__name__)

# Dots per inch of pictures: sharp on a phone, and 80 layers stay readable.
_DPI = 130

# Endings of the files that an item writes.
SUFFIXES = (".csv", ".png")


@dataclass(frozen=True)
class ReportItem:
    """One subject of a run's report: a table, and the figure that belongs to it.

    Args:
        name: Name for files and for loggers' keys: ``"layers"``.
        title: Heading for people.
        columns: Header of the table.
        rows: Lines of the table, of plain values.
        draw: Function that makes the matplotlib figure.
        write: Function that writes the table to a file; plain CSV is written if None.
        charts: Function that gives the charts of the page; if None, the page shows what ``draw`` makes.
        note: What the columns mean, in whole sentences for the page.
        page: Name of a page of its own, ``<page>.html`` beside the report; ``""`` for a place in the report.

    Example:
        >>> def draw():
        ...     from matplotlib.figure import Figure
        ...     return Figure()
        >>> item = ReportItem("speed", "Speed of each layer", ["layer", "seconds"], [["conv1", 0.5]], draw)
        >>> print(item.text)
        layer  seconds
        -----  -------
        conv1      0.5
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    draw: Callable[[], Any]
    write: Callable[[Path], None] | None = None
    charts: Callable[[], Sequence[Chart]] | None = None
    note: str = ""
    page: str = ""

    @property
    def text(self) -> str:
        """The table, for a terminal."""
        return text_table(self.columns, self.rows)

    def save(self, folder: Path) -> None:
        """Write ``<name>.csv`` and, with matplotlib, ``<name>.png`` into a folder."""
        table = folder / f"{self.name}.csv"
        if self.write is not None:
            self.write(table)
        else:
            content = io.StringIO(newline="")
            rows = [[inert(cell) for cell in row] for row in (self.columns, *self.rows)]
            csv.writer(content, lineterminator="\n").writerows(rows)
            write_atomically(table, content.getvalue().encode())
        if self.png is not None:
            write_atomically(folder / f"{self.name}.png", self.png)

    @cached_property
    def png(self) -> bytes | None:
        """The picture, drawn once for folder, page and loggers; None without matplotlib, and where drawing fails, which
        must not end a run of hours."""
        content = io.BytesIO()
        try:
            self.draw().savefig(content, format="png", dpi=_DPI)
        except ModuleNotFoundError as error:
            log.info("%s is not drawn: %s (pip install matplotlib).", self.name, error)
            return None
        except Exception as error:
            self._warn(error)
            return None
        return content.getvalue()

    @cached_property
    def drawn_charts(self) -> Sequence[Chart]:
        """Charts of the page, for which there must be values; none where making them fails, as with ``png``."""
        try:
            charts = [] if self.charts is None else self.charts()
        except Exception as error:
            self._warn(error)
            return []
        return [chart for chart in charts if any(series.finite for series in chart.series)]

    def _warn(self, error: Exception) -> None:
        log.warning("%s cannot be drawn (%s: %s).", self.name, type(error).__name__, error)
