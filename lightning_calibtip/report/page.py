"""``report.html``: a run on one page that needs no network."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.whole_file import write_whole
from .exhibit import Exhibit

# What stands for a value that there is none of; the page's script knows it too.
MISSING = "-"


@dataclass(frozen=True)
class Section:
    """A part of the page: an exhibit, as picture and table.

    Args:
        title: Heading.
        exhibit: What is shown.
        open: Whether the table is open from the start.
    """

    title: str
    exhibit: Exhibit
    open: bool = False


def render_page(record: Mapping[str, Any], sections: Sequence[Section], configuration: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        record: Of the run, see ``run_record``.
        sections: In order.
        configuration: Settings of the run, by name.

    Raises:
        ModuleNotFoundError: Without jinja2 (which torch brings with it).
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
        sections=[(section, _picture(section.exhibit)) for section in sections],
        configuration={name: json.dumps(value, default=str) for name, value in configuration.items()},
    )


def write_page(
    path: str | Path, record: Mapping[str, Any], sections: Sequence[Section], configuration: Mapping[str, Any]
) -> None:
    """Write the page: whole or not at all."""
    write_whole(path, render_page(record, sections, configuration).encode())


def _picture(exhibit: Exhibit) -> str | None:
    """The figure as a data URI, if there is one."""
    return None if exhibit.png is None else f"data:image/png;base64,{base64.b64encode(exhibit.png).decode()}"


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
