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
        figure, axes = figure_over_layers([result.name for result in results], 3.5, "unit")
        places = [place for place, result in enumerate(results) if math.isfinite(result.error_before)]
        before, after = [results[i].error_before for i in places], [results[i].error_after for i in places]
        axes.plot(places, before, "o-", label="before AdaQuant", markersize=4)
        axes.plot(places, after, "s-", label="after AdaQuant", markersize=4)
        if any(error > 0 for error in [*before, *after]):
            axes.set_yscale("log")
        axes.set_ylabel("error / mean square of the output")
        figure.legend(loc="outside upper right", ncols=2)
        return figure

    columns = ["unit", "layers", "error before", "error after", "seconds in steps", "what became of it"]
    name = "reconstruction" if candidate is None else "reconstruction_w{}a{}".format(*candidate)
    return Exhibit(name, columns, rows, draw)
