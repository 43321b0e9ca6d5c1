"""What the pictures of layers have in common (matplotlib, which the ``recipes`` extra installs)."""

from collections.abc import Sequence
from typing import Any

# Inches; beyond it matplotlib would refuse the picture.
_WIDEST = 200.0


def figure_over_layers(layers: int, height: float) -> tuple[Any, Any]:
    """Figure and axes wide enough for the names of so many layers; the height is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(max(6.4, 0.2 * layers + 2), _WIDEST), height), layout="constrained")
    return figure, figure.subplots()


def name_layers(axes: Any, names: Sequence[str], what: str = "layer") -> None:
    """Put the names below the axes."""
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_xlabel(f"{what}, in the order of execution")
    axes.set_xlim(-0.6, len(names) - 0.4)
