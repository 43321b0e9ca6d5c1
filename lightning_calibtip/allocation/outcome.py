"""Outcome of a bit allocation, and of a sweep over budgets the rule by which one is taken."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..quantization.scheme import Bits
from .table import SensitivityTable


@dataclass(frozen=True)
class Point:
    """One model of the trade-off.

    Args:
        label: ``"0.13"`` for the budget it was solved for, ``"W4A8"`` for a uniform width.
        bits: Width of each free layer.
        compression: Bits of the weights over 32 bits each.
        predicted_loss: Sum of the single-layer losses.
        measured_loss: True rise of the loss over the base.
        costs: All costs that the goal names.
        metrics: What the user's own evaluation gave, if there is one.
        proved: Whether the solver had proved that no better choice exists (by the predicted losses).
    """

    label: str
    bits: dict[str, Bits]
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
        uniform: Every candidate in all free layers, for comparison (with a sweep only).
        sensitivity: The table that was solved.
    """

    chosen: Point
    curve: list[Point]
    uniform: list[Point]
    sensitivity: SensitivityTable


@dataclass(frozen=True)
class Sweep:
    """Several budgets solved from one table, and the rule by which one of the points is taken.

    Args:
        compression: The budgets, each above 0 and at most 1; none for no sweep.
        under: Only points of at most this compression are taken; None for all.
        max_degradation: Take the smallest point whose measured loss lies at most this much above the base; None for the
            one of least loss.

    Raises:
        ValueError: If a budget is out of its range, or there is a rule but no sweep.
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
