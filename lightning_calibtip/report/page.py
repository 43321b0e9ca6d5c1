"""``report.html``: a run on one page that needs no network."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically
from .chart import HEIGHT, Chart
from .item import ReportItem
from .metrics import share_error, verdict
from .numbers import number, percent, short, signed, sort_key
from .settings import Setting


@dataclass(frozen=True)
class Section:
    """A part of the page: a report item, as charts and table, under its title.

    Args:
        item: What is shown.
        open: Whether the table is open from the start.

    Example:
        See ``render_page``.
    """

    item: ReportItem
    open: bool = False

    @property
    def charts(self) -> Sequence[Chart]:
        """Charts of the item; none if it has only a picture."""
        return self.item.drawn_charts

    @property
    def picture(self) -> str | None:
        """The picture as a data URI, if there is one."""
        png = self.item.png
        return None if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"


def render_page(record: Mapping[str, Any], sections: Sequence[Section], settings: Sequence[Setting]) -> str:
    """The page as HTML. Items with a page of their own are only linked to.

    Args:
        record: Record of the run, see ``run_record``.
        sections: Parts of the page, in order.
        settings: Settings of the run.

    Raises:
        ModuleNotFoundError: Without jinja2 (which torch brings with it).

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.network import QuantizedNetwork
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.report.reconstruction import reconstruction_item
        >>> from lightning_calibtip.report.record import run_record
        >>> network = QuantizedNetwork(nn.Sequential(nn.Linear(2, 3)), QuantizationScheme())
        >>> record = run_record(network, "recipe", "net", "top1", 0, 32, 0.95, [])
        >>> html = render_page(record, [Section(reconstruction_item([]))], [Setting("", "weight_bits", "4")])
        >>> "<h2>Error of each unit before and after AdaQuant</h2>" in html
        True
    """
    float_metrics = {name: metric["float"] for name, metric in record["metrics"].items()}
    here = [section for section in sections if not section.item.page]
    return _template("page.html").render(
        record=record, sections=here, settings=settings, float_metrics=float_metrics, pages=pages_of(sections)
    )


def pages_of(sections: Sequence[Section]) -> list[str]:
    """Names of the pages that some items have to themselves.

    Example:
        >>> from dataclasses import replace
        >>> from lightning_calibtip.report.reconstruction import reconstruction_item
        >>> pages_of([Section(replace(reconstruction_item([]), page="diagnosis"))])
        ['diagnosis']
    """
    return list(dict.fromkeys(section.item.page for section in sections if section.item.page))


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lightning_calibtip.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for use in (number, signed, short, percent, sort_key, verdict, share_error):
        environment.filters[use.__name__] = use
    environment.filters["minus"] = _minus
    environment.filters["quoted"] = json.dumps
    environment.globals["height"] = HEIGHT
    return environment.get_template(name)


def write_page(
    path: str | Path, record: Mapping[str, Any], sections: Sequence[Section], settings: Sequence[Setting]
) -> None:
    """Write the page, and beside it those that some items have to themselves: each completely or not at all. See
    ``render_page``."""
    write_atomically(path, render_page(record, sections, settings).encode())
    for page in pages_of(sections):
        own = [section for section in sections if section.item.page == page]
        content = _template("own_page.html").render(record=record, sections=own, page=page)
        write_atomically(Path(path).with_name(f"{page}.html"), content.encode())


def _minus(value: float | None, other: float | None) -> float | None:
    """A difference, where both are known."""
    return None if value is None or other is None else value - other
