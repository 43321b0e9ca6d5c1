"""What the figures of layers have in common (they need matplotlib, which the ``recipes`` extra installs)."""

from collections.abc import Sequence
from typing import Any

# Inches; beyond it matplotlib would refuse the picture.
_WIDEST = 200.0

# Width of a letter of a name in inches.
_LETTER = 0.062


def plain_text(name: str) -> str:
    r"""Escape a name so that matplotlib shows it as it is: dollars would begin a formula.

    Example:
        >>> print(plain_text("cost$"))
        cost\$
    """
    return name.replace("$", r"\$")


def figure_over_layers(names: Sequence[str], height: float, what: str = "layer") -> tuple[Any, Any]:
    """Make a figure and axes with room for the names of the layers, which stand below.

    Args:
        names: Names of the layers, in the order of execution.
        height: Height of the figure above the names, in inches.
        what: What is named.

    Example:
        >>> figure, axes = figure_over_layers(["conv1", "fc"], 2.0)
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['conv1', 'fc']
    """
    from matplotlib.figure import Figure

    width = min(max(6.4, 0.2 * len(names) + 2), _WIDEST)
    figure = Figure(figsize=(width, height + _LETTER * max(map(len, names), default=0)), layout="constrained")
    axes = figure.subplots()
    axes.set_xticks(range(len(names)), list(map(plain_text, names)), rotation=90, fontsize=7)
    axes.set_xlabel(f"{what}, in the order of execution")
    axes.set_xlim(-0.6, len(names) - 0.4)
    return figure, axes
