"""BatchNormTuning: re-estimate the statistics of folded BatchNorms on the quantized model."""

from pathlib import Path

from typing_extensions import override

from ..calibration.activation_store import ActivationStore, parse_bytes
from ..module import QuantizationModule
from ..tuning.batch_norm import REFERENCES, tune_batch_norm
from .stage import Stage


class BatchNormTuning(Stage):
    """Rebuilds each folded BatchNorm, re-estimates its statistics on the quantized model and folds it again.

    Args:
        reference: What channels are brought back to: ``"float"``, the float model's statistics over the calibration
            set, or ``"training"``, BatchNorm's own gamma and beta, as in the paper.
        activation_budget: Bytes of captured activations that may lie in memory, see ``AdaQuant``.
        scratch_folder: Where the rest lies meanwhile, see ``AdaQuant``.

    Raises:
        ValueError: If ``reference`` is unknown.
    """

    def __init__(
        self,
        reference: str = "float",
        activation_budget: int | str | None = None,
        scratch_folder: str | Path | None = None,
    ) -> None:
        super().__init__()
        if reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {reference!r}.")
        self.reference = reference
        self.activation_budget = parse_bytes(activation_budget, "activation_budget")
        self.scratch_folder = scratch_folder

    @override
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Tune layer by layer, in the order of execution."""
        with ActivationStore(self.activation_budget, folder=self.scratch_folder) as store:
            result = tune_batch_norm(module.network, module.calibration, self.reference, store, self.steps)
        return {
            "layers": float(len(result.layers)),
            "divergence_before": result.divergence_before,
            "divergence_after": result.divergence_after,
        }
