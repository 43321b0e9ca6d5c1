"""Outcome of a bit allocation, and the rule by which one point of a sweep over budgets is picked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..quantization.spec import BitWidths
from .table import SensitivityTable


@dataclass(frozen=True)
class Point:
    """One model of the trade-off.

    Args:
        label: ``"0.13"`` for the budget it was solved for, ``"W4A8"`` for uniform bit-widths.
        bits: Bit-widths of each searchable layer.
        compression: Bits of the weights over 32 bits each.
        predicted_loss: Sum of the single-layer losses; NaN where these are of another loss than the measured one.
        measured_loss: True rise of the loss over the base.
        costs: All costs that the constraints name.
        metrics: Metrics of the user's own evaluation, if there is one.
        proved: Whether the solver had proved that no better choice exists (by the predicted losses).

    Example:
        >>> Point("W4A8", {"fc": BitWidths(4, 8)}, 0.125, 0.02, 0.03, {}).bits["fc"].label
        'W4A8'
    """

    label: str
    bits: dict[str, BitWidths]
    compression: float
    predicted_loss: float
    measured_loss: float
    costs: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    proved: bool = True


@dataclass(frozen=True)
class Allocation:
    """Outcome of a bit allocation.

    Args:
        chosen: The model as it now is.
        curve: All solved points, in the order of the budgets; one without a sweep.
        uniform: Every candidate in all searchable layers, for comparison (with a sweep only).
        sensitivity: Table of sensitivities that was solved.
        metric: Name of the loss that was measured; ``""`` if it is the table's.

    Example:
        See ``allocate``.
    """

    chosen: Point
    curve: list[Point]
    uniform: list[Point]
    sensitivity: SensitivityTable
    metric: str = ""


@dataclass(frozen=True)
class Sweep:
    """Several budgets solved from one table, and the rule by which one of the points is picked.

    Args:
        compression: The budgets, each above 0 and at most 1; none for no sweep.
        under: Greatest compression of a point that may be picked; None for any.
        max_degradation: The smallest point whose measured loss is at most this much above the base is picked; None for
            the one of least loss.

    Raises:
        ValueError: If a budget is out of its range, or there is a rule but no sweep.

    Example:
        >>> small, large = Point("0.1", {}, 0.1, 0.5, 0.6, {}), Point("0.2", {}, 0.2, 0.1, 0.1, {})
        >>> Sweep([0.1, 0.2]).pick([small, large]).label, Sweep([0.1, 0.2], under=0.15).pick([small, large]).label
        ('0.2', '0.1')
    """

    compression: Sequence[float] = ()
    under: float | None = None
    max_degradation: float | None = None

    def __post_init__(self) -> None:
        for value in self.compression:
            if not 0 < value <= 1:
                raise ValueError(f"compression must be above 0 and at most 1, got {value}.")
        if self.under is not None and not 0 < self.under <= 1:
            raise ValueError(f"pick_under must be above 0 and at most 1, got {self.under}.")
        if self.max_degradation is not None and not -math.inf < self.max_degradation < math.inf:
            raise ValueError(f"max_degradation must be a finite number, got {self.max_degradation}.")
        if not self.compression and (self.under, self.max_degradation) != (None, None):
            raise ValueError("pick_under and max_degradation pick a point of a sweep: give compression as a list.")

    def pick(self, curve: Sequence[Point]) -> Point:
        """Apply the rule.

        Raises:
            ValueError: If no point meets it; states what there is.
        """
        points = sorted(curve, key=lambda point: point.compression)
        meeting = [
            point
            for point in points
            if (self.under is None or point.compression <= self.under * (1 + 1e-9))
            and (self.max_degradation is None or point.measured_loss <= self.max_degradation)
        ]
        if not meeting:
            there = ", ".join(f"{point.compression:.4f}: {point.measured_loss:.4g}" for point in points)
            raise ValueError(
                f"No point of the sweep has a compression of at most {self.under} and a degradation of at most "
                f"{self.max_degradation}. Measured (compression: degradation): {there}."
            )
        return meeting[0] if self.max_degradation is not None else min(meeting, key=lambda point: point.measured_loss)
