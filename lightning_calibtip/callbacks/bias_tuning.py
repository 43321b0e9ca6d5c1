"""BiasTuning: tune the biases of the quantized model to the float model's logits."""

from typing_extensions import override

from ..module import QuantizationModule
from ..tuning.bias import BiasTuningSettings, tune_bias
from .stage import Stage


class BiasTuning(Stage):
    """Minimises the KL divergence to the float model's logits over biases (and scales, if asked), end to end.

    Args:
        epochs: Passes over the calibration set.
        rate: Learning rate of biases, as a fraction of the root mean square of each layer's output.
        scale_rate: Learning rate of scales, as a fraction of each tensor's mean scale; 0 leaves them alone.
        holdout: Share of the calibration batches that decides whether the result is kept, at least 0 and below 1.
        seed: Of the order of batches.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        epochs: int = BiasTuningSettings.epochs,
        rate: float = BiasTuningSettings.rate,
        scale_rate: float = BiasTuningSettings.scale_rate,
        holdout: float = BiasTuningSettings.holdout,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = BiasTuningSettings(epochs, rate, scale_rate, holdout, seed)

    @override
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Tune and keep the better state."""
        result = tune_bias(module.network, module.calibration, self.settings, self.steps)
        return {"divergence_before": result.divergence_before, "divergence_after": result.divergence_after}
