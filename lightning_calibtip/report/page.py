"""``report.html``: a run on one page that needs no network."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically
from .item import ReportItem

# What is shown for a missing value; the page's script knows it too.
MISSING = "-"


@dataclass(frozen=True)
class Section:
    """A part of the page: a report item, as picture and table, under its title.

    Args:
        item: What is shown.
        open: Whether the table is open from the start.

    Example:
        See ``render_page``.
    """

    item: ReportItem
    open: bool = False


def render_page(record: Mapping[str, Any], sections: Sequence[Section], configuration: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        record: Record of the run, see ``run_record``.
        sections: Parts of the page, in order.
        configuration: Settings of the run, by name.

    Raises:
        ModuleNotFoundError: Without jinja2 (which torch brings with it).

    Example:
        >>> from lightning_calibtip.report.reconstruction import reconstruction_item
        >>> record = {"model": "net", "recipe": "test", "seed": 0, "calibration_samples": 1, "metric": "top1",
        ...           "float": 0.9, "quantized": 0.8, "stages": [], "size": {"quantized_bytes": 1, "ratio": 0.5}}
        >>> html = render_page(record, [Section(reconstruction_item([]))], {"weight_bits": 4})
        >>> "<h2>Error of each unit before and after AdaQuant</h2>" in html
        True
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lightning_calibtip.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["sort_key"] = _sort_key
    return environment.get_template("page.html").render(
        record=record,
        sections=[(section, _picture(section.item)) for section in sections],
        configuration={name: json.dumps(value, default=str) for name, value in configuration.items()},
    )


def write_page(
    path: str | Path, record: Mapping[str, Any], sections: Sequence[Section], configuration: Mapping[str, Any]
) -> None:
    """Write the page: completely or not at all. See ``render_page``."""
    write_atomically(path, render_page(record, sections, configuration).encode())


def _picture(item: ReportItem) -> str | None:
    """The figure as a data URI, if there is one."""
    return None if item.png is None else f"data:image/png;base64,{base64.b64encode(item.png).decode()}"


def _sort_key(value: float) -> str:
    """A number as JavaScript reads it."""
    return str(value).replace("inf", "Infinity").replace("nan", "NaN")


def _number(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else str(value)
