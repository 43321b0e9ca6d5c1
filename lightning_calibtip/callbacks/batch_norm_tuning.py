"""BatchNormTuning: re-estimate the statistics of folded BatchNorms on the quantized model."""

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from ..calibration.options import StorageOptions
from ..module import QuantizationModule
from ..tuning.batch_norm import BatchNormTuningOptions, tune_batch_norm
from .options import merge_fields, storage_options
from .outcome import stage_outcome
from .stage import Stage, StageResult


class BatchNormTuning(Stage):
    """Rebuilds each folded BatchNorm, re-estimates its statistics on the quantized model and folds it again.

    Args:
        options: What the statistics are brought back to; the defaults of ``BatchNormTuningOptions`` if None.
        storage: Where captured activations are kept: ``StorageOptions``, or a mapping of its fields
            (``{"activation_budget": "2GB"}``).
        **changes: Fields of ``BatchNormTuningOptions`` that differ: ``reference``.

    Raises:
        TypeError: If an option does not exist.
        ValueError: If a value is out of its range.

    Example:
        >>> BatchNormTuning(reference="training").options.reference
        'training'
    """

    compares_logits = True

    def __init__(
        self,
        options: BatchNormTuningOptions | None = None,
        *,
        storage: StorageOptions | Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        changes = merge_fields(self.name, BatchNormTuningOptions, options, changes)
        self.options = BatchNormTuningOptions(**changes)
        self.storage = storage_options(self.name, storage)

    @override
    def run(self, module: QuantizationModule) -> StageResult:
        """Tune layer by layer, in the order of execution."""
        with self.storage.open() as store:
            result = tune_batch_norm(module.network, module.calibration, self.options, store, self.progress)
        figures = {
            "layers": float(len(result.layers)),
            "divergence_before": result.divergence_before,
            "divergence_after": result.divergence_after,
        }
        subject = f"Statistics of {len(result.layers)} folded BatchNorms"
        if not result.layers:
            return StageResult(figures, outcome="No BatchNorm is folded into a layer: nothing to tune.")
        return StageResult(figures, outcome=stage_outcome(subject, "re-estimated", result))
