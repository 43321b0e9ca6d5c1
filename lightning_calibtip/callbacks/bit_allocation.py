"""BitAllocation: give each layer its own width under a size budget."""

from collections.abc import Sequence

from typing_extensions import override

from ..allocation.allocate import Allocation, allocate
from ..module import QuantizationModule
from ..quantization.scheme import check_pair
from .stage import Stage


class BitAllocation(Stage):
    """Measures the loss of each layer at each candidate width and solves an integer program for the best mix.

    ``allocation`` holds the last outcome.

    Args:
        compression: Budget: weight bits of the quantizable layers over 32 bits each (0.125 is 4 bits throughout), above
            0 and at most 1.
        candidates: Widths, or pairs ``(weight_bits, activation_bits)``; at least two.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(self, compression: float = 0.13, candidates: Sequence[int | Sequence[int]] = (4, 8)) -> None:
        super().__init__()
        if not 0 < compression <= 1:
            raise ValueError(f"compression must be above 0 and at most 1, got {compression}.")
        self.compression = compression
        self.candidates = list(dict.fromkeys(check_pair(pair, "candidates") for pair in candidates))
        if len(self.candidates) < 2:
            raise ValueError(f"candidates must be at least two different widths, got {candidates!r}.")
        self.allocation: Allocation | None = None

    @override
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Measure, solve and apply."""
        allocation = allocate(module.network, module.calibration, self.candidates, self.compression)
        self.allocation = allocation
        return {"predicted_loss": allocation.predicted_loss, "compression": allocation.compression}
