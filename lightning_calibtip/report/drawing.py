"""What the pictures of layers have in common (matplotlib, which the ``recipes`` extra installs)."""

from collections.abc import Sequence
from typing import Any

# Inches; beyond it matplotlib would refuse the picture.
_WIDEST = 200.0

# Inches of a letter of a name.
_LETTER = 0.062


def plain_text(name: str) -> str:
    """A name that matplotlib shows as it is: dollars would begin a formula."""
    return name.replace("$", r"\$")


def figure_over_layers(names: Sequence[str], height: float, what: str = "layer") -> tuple[Any, Any]:
    """Figure and axes with room for the names of the layers, which stand below.

    Args:
        names: In the order of execution.
        height: Of what is above the names, in inches.
        what: Is named.
    """
    from matplotlib.figure import Figure

    width = min(max(6.4, 0.2 * len(names) + 2), _WIDEST)
    figure = Figure(figsize=(width, height + _LETTER * max(map(len, names), default=0)), layout="constrained")
    axes = figure.subplots()
    axes.set_xticks(range(len(names)), list(map(plain_text, names)), rotation=90, fontsize=7)
    axes.set_xlabel(f"{what}, in the order of execution")
    axes.set_xlim(-0.6, len(names) - 0.4)
    return figure, axes
