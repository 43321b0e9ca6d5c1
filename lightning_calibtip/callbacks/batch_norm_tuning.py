"""BatchNormTuning: re-estimate the statistics of folded BatchNorms on the quantized model."""

from typing_extensions import override

from ..module import QuantizationModule
from ..tuning.batch_norm import tune_batch_norm
from .stage import Stage


class BatchNormTuning(Stage):
    """Rebuilds each folded BatchNorm from its gamma and beta, re-estimates it over the calibration set and folds it again."""

    @override
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Tune layer by layer, in the order of execution."""
        return {"layers": float(len(tune_batch_norm(module.network, module.calibration)))}
