"""BatchNormTuning: re-estimate the statistics of folded BatchNorms on the quantized model."""

from typing_extensions import override

from ..module import QuantizationModule
from ..tuning.batch_norm import REFERENCES, tune_batch_norm
from .stage import Stage


class BatchNormTuning(Stage):
    """Rebuilds each folded BatchNorm, re-estimates its statistics on the quantized model and folds it again.

    Args:
        reference: What channels are brought back to: ``"float"``, the float model's statistics over the calibration
            set, or ``"training"``, BatchNorm's own gamma and beta, as in the paper.

    Raises:
        ValueError: If ``reference`` is unknown.
    """

    def __init__(self, reference: str = "float") -> None:
        super().__init__()
        if reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {reference!r}.")
        self.reference = reference

    @override
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Tune layer by layer, in the order of execution."""
        result = tune_batch_norm(module.network, module.calibration, self.reference)
        return {
            "layers": float(len(result.layers)),
            "divergence_before": result.divergence_before,
            "divergence_after": result.divergence_after,
        }
