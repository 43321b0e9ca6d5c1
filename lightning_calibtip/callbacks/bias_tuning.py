"""BiasTuning: tune the biases of the quantized model to what the float model says."""

import math
from typing import Any

from typing_extensions import override

from ..calibration.divergences import divergence_of
from ..module import QuantizationModule
from ..tuning.bias import BiasTuningOptions, tune_bias
from .options import merge_fields
from .outcome import stage_outcome
from .stage import Stage, StageResult


class BiasTuning(Stage):
    """Minimises the divergence from the float model's logits over biases (and scales, if asked), end to end.

    Args:
        options: How biases are tuned; the defaults of ``BiasTuningOptions`` if None.
        **changes: Fields of ``BiasTuningOptions`` that differ: ``epochs``, ``rate``, ...

    Raises:
        TypeError: If an option does not exist.
        ValueError: If a value is out of its range.

    Example:
        >>> BiasTuning(epochs=2).options.epochs
        2
    """

    compares_logits = True

    def __init__(self, options: BiasTuningOptions | None = None, **changes: Any) -> None:
        super().__init__()
        changes = merge_fields(self.name, BiasTuningOptions, options, changes)
        self.options = BiasTuningOptions(**changes)
        self.divergence = divergence_of(self.options.divergence)

    @override
    def run(self, module: QuantizationModule) -> StageResult:
        """Tune and keep the better state."""
        result = tune_bias(module.network, module.calibration, self.options, self.progress)
        outcome = stage_outcome("Biases", "tuned", result)
        if math.isnan(result.divergence_before):
            return StageResult({}, outcome=outcome)
        figures = {"divergence_before": result.divergence_before, "divergence_after": result.divergence_after}
        return StageResult(figures, outcome=outcome)
