"""Which nodes of graphs are protected while ranges are chosen and layers reconstructed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protection:
    """Probabilities with which nodes of graphs are protected, growing with the rank of their in-degree.

    Args:
        low: Probability of the nodes of the lowest in-degree, 0 to 1.
        high: Probability of those of the highest, at least ``low`` and at most 1. Degree-Quant takes 0.1 or 0.2.

    Raises:
        ValueError: If a probability is out of its range.

    Example:
        >>> bool(Protection()), bool(Protection(high=0.1))
        (False, True)
    """

    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (self.low, self.high))
        if not numbers or not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"The probabilities of a protection must be 0 <= low <= high <= 1, got low={self.low!r} and "
                f"high={self.high!r}."
            )

    def __bool__(self) -> bool:
        return self.high > 0
