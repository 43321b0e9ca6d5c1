"""AdaQuant: reconstruct each layer or block so that its quantized output matches the float one."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from ..module import QuantizationModule
from ..quantization.scheme import check_pair
from ..reconstruction.adaquant import adaquant
from ..reconstruction.candidates import adaquant_candidates
from ..reconstruction.settings import MODES, PAPER, AdaQuantSettings
from ..reconstruction.units import GRANULARITIES
from .stage import Stage


class AdaQuant(Stage):
    """Optimises weights, bias, scales and zero points of each unit against the mean squared error of its output.

    Args:
        mode: ``"sequential"``: each unit sees the quantized outputs of those before it; ``"parallel"``: float ones.
        granularity: A unit is a ``"layer"``, or a ``"block"`` of layers around which paths fork and join (found by
            running).
        iterations: Steps of Adam a unit.
        batch_size: Samples a step.
        weight_rate: Learning rate of weights.
        bias_rate: Learning rate of biases.
        weight_range_rate: Learning rate of the weights' scales.
        input_range_rate: Learning rate of the inputs' scales.
        zero_point_rate: Learning rate of zero points, in integer steps.
        relative: Whether rates are fractions of a quantization step (see ``AdaQuantSettings``), or absolute.
        schedule: ``"cosine"`` or ``"constant"``.
        holdout: Share of the calibration samples that decides whether a unit's result is kept.
        candidates: Widths, or pairs ``(weight_bits, activation_bits)``, to reconstruct every layer at, for
            ``BitAllocation`` to choose from; needs ``mode="parallel"`` and layers. None for the module's own widths
            only.
        seed: Of the mini-batches.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        mode: str = "sequential",
        granularity: str = "layer",
        iterations: int = AdaQuantSettings.iterations,
        batch_size: int = AdaQuantSettings.batch_size,
        weight_rate: float = AdaQuantSettings.weight_rate,
        bias_rate: float = AdaQuantSettings.bias_rate,
        weight_range_rate: float = AdaQuantSettings.weight_range_rate,
        input_range_rate: float = AdaQuantSettings.input_range_rate,
        zero_point_rate: float = AdaQuantSettings.zero_point_rate,
        relative: bool = True,
        schedule: str = "cosine",
        holdout: float = AdaQuantSettings.holdout,
        candidates: Sequence[int | Sequence[int]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}.")
        self.mode, self.granularity = mode, granularity
        self.settings = AdaQuantSettings(
            iterations,
            batch_size,
            weight_rate,
            bias_rate,
            weight_range_rate,
            input_range_rate,
            zero_point_rate,
            relative,
            schedule,
            holdout,
            seed,
        )
        self.candidates = None if candidates is None else [check_pair(pair, "candidates") for pair in candidates]
        if self.candidates is not None and (mode, granularity, bool(self.candidates)) != ("parallel", "layer", True):
            raise ValueError(
                f'candidates must not be empty and need mode="parallel" and granularity="layer", got {candidates!r}, '
                f"{mode!r} and {granularity!r}: states that were reconstructed together cannot be mixed."
            )

    @classmethod
    def paper(cls, **kwargs: Any) -> "AdaQuant":
        """With the settings of the paper's code: absolute rates, no decay, batches of 50. Other arguments as given."""
        return cls(**{**PAPER, **kwargs})

    @override
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Reconstruct the model unit by unit."""
        network, calibration = module.network, module.calibration
        if self.candidates is None:
            results = adaquant(network, calibration, self.settings, self.mode, self.granularity)
        else:
            by_width = adaquant_candidates(network, calibration, self.settings, self.candidates)
            results = [result for results in by_width.values() for result in results]
        return {
            "error_before": sum(result.error_before for result in results) / len(results),
            "error_after": sum(result.error_after for result in results) / len(results),
            "units": float(len(results)),
            "restored": float(sum(not result.kept for result in results)),
        }
