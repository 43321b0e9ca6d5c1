"""Diagnosis: what each layer costs, why, and what can be done about it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ..calibration.divergences import divergence_of
from ..calibration.options import StorageOptions
from ..diagnosis.apply import apply_remedies
from ..diagnosis.diagnose import DiagnosisResult, diagnose
from ..diagnosis.options import DiagnosisOptions
from ..module import QuantizationModule
from ..report.diagnosis import diagnosis_items
from ..report.metrics import better_higher
from .options import merge_fields, storage_options
from .stage import Stage, StageResult


class Diagnosis(Stage):
    """Measures how much of the model's loss the weights and the inputs of each layer cost, names the cause, and says
    what can be done; applies remedies if asked.

    It comes last, after ``Calibration`` and whatever else has run; ``diagnosis`` holds the outcome. With ``apply=True``
    it needs the user's validation: ``quantize`` and ``QuantizationRun.diagnose`` bring it along, and ``evaluate`` can
    be set.

    Args:
        options: What is measured, and whether remedies are applied; the defaults of ``DiagnosisOptions`` if None.
        storage: Where captured activations are kept: ``StorageOptions``, or a mapping of its fields
            (``{"activation_budget": "2GB"}``).
        **changes: Fields of ``DiagnosisOptions`` that differ: ``apply``, ``max_degradation``, ``metric``, ...

    Raises:
        TypeError: If an option does not exist.
        ValueError: If a value is out of its range.

    Example:
        >>> Diagnosis(apply=True, max_degradation=0.01, metric="val_acc").options.metric
        'val_acc'
    """

    def __init__(
        self,
        options: DiagnosisOptions | None = None,
        *,
        storage: StorageOptions | Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        changes = merge_fields(self.name, DiagnosisOptions, options, changes)
        self.options = DiagnosisOptions(**changes)
        self.storage = storage_options(self.name, storage)
        self.diagnosis: DiagnosisResult | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See ``Stage``; without validation no remedy can be applied."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.options.apply and self.evaluate is None:
            raise MisconfigurationException(
                "Diagnosis(apply=True) stops at your own validation metric: pass validation data to quantize(...), "
                "call run.diagnose(apply=True), or set the stage's evaluate to a function that gives metrics."
            )

    @override
    def check_plan(self, module: QuantizationModule) -> None:
        """See ``Stage``: divergences compare logits."""
        loss = self.options.loss
        if not callable(loss):
            module.require_logits(divergence_of(loss))

    @override
    def run(self, module: QuantizationModule) -> StageResult:
        """Measure, name causes and remedies, and apply remedies if asked."""
        network, calibration, options = module.network, module.calibration, self.options
        with self.storage.open() as store:
            result = diagnose(network, calibration, options, store, self.progress)
            if options.apply:
                assert self.evaluate is not None
                if options.mode is None and options.metric is not None:
                    higher = better_higher(options.metric)
                    options = options if higher is None else replace(options, mode="max" if higher else "min")
                result = apply_remedies(network, calibration, result, options, self.evaluate, store, self.progress)
        self.diagnosis = result
        figures = {"loss": result.applied[-1].loss if result.applied else result.quantized_loss}
        figures |= {"loss_before": result.quantized_loss, "remedies": float(len(result.applied))}
        worst = ", ".join(layer.name for layer in result.worst(3))
        outcome = f"The layers that cost most are {worst}. {result.outcome}".strip()
        return StageResult(figures, diagnosis_items(result), outcome)
