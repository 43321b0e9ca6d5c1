"""What AdaQuant has to show: the error of each unit before and after."""

import math
from collections.abc import Sequence
from typing import Any

from ..quantization.scheme import Bits
from ..reconstruction.optimize import UnitResult
from .drawing import figure_over_layers
from .exhibit import Exhibit


def reconstruction_exhibit(results: Sequence[UnitResult], candidate: Bits | None = None) -> Exhibit:
    """Relative error of each unit on held-out samples, before and after.

    Args:
        results: In the order of execution.
        candidate: The width of all units, where several are reconstructed for bit allocation.
    """
    rows = [[r.name, len(r.layers), r.error_before, r.error_after, r.seconds, r.note or "kept"] for r in results]

    def draw() -> Any:
        names = [result.name for result in results]
        return draw_errors(names, [r.error_before for r in results], [r.error_after for r in results], "unit")

    columns = ["unit", "layers", "error before", "error after", "seconds in steps", "what became of it"]
    name = "reconstruction" if candidate is None else "reconstruction_w{}a{}".format(*candidate)
    return Exhibit(name, columns, rows, draw)


def draw_errors(names: Sequence[str], before: Sequence[float], after: Sequence[float], what: str = "layer") -> Any:
    """Errors before and after AdaQuant, on a logarithmic axis; what has none (NaN) is left out.

    Args:
        names: Of layers or units, in the order of execution.
        before: Relative error of each.
        after: The same afterwards.
        what: Is named.
    """
    figure, axes = figure_over_layers(names, 3.5, what)
    places = [place for place, error in enumerate(before) if math.isfinite(error)]
    for errors, marker, label in ((before, "o-", "before AdaQuant"), (after, "s-", "after AdaQuant")):
        axes.plot(places, [errors[place] for place in places], marker, label=label, markersize=4)
    if any(errors[place] > 0 for errors in (before, after) for place in places):
        axes.set_yscale("log")
    axes.set_ylabel("error / mean square of the output")
    figure.legend(loc="outside upper right", ncols=2)
    return figure
