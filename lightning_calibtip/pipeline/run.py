"""The outcome of a run: what was measured after each stage, and what it writes and shows."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from ..allocation.work import Work
from ..callbacks.decision_costs import DecisionCosts
from ..callbacks.diagnosis import Diagnosis
from ..callbacks.stage import Stage
from ..diagnosis.diagnose import DiagnosisResult
from ..export.onnx_file import export_onnx
from ..export.report import ExportReport, export_item
from ..module import QuantizationModule
from ..quiet import quiet_trainers
from ..report.histograms import histograms_item
from ..report.item import ReportItem
from ..report.layers import layers_item
from ..report.loggers import log_checkpoint, log_items
from ..report.metrics import Validation
from ..report.page import Section, pages_of, write_page
from ..report.record import StageRecord, remove_previous_items, run_record, write_record
from ..report.shares import shares_item
from ..report.size import bit_operations
from .checkpoint_io import AtomicCheckpointIO
from .settings import run_settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageOutcome:
    """Outcome of one stage of a run.

    Args:
        name: Name of the stage, numbered from its second run on.
        seconds: Time that the stage took, without the evaluation after it.
        metrics: What the user's own validation logged after it.
        figures: What the stage itself measured.
        items: Report items of the stage.
        outcome: What became of it, in whole sentences.

    Example:
        >>> StageOutcome("Calibration", 1.5, {"accuracy": 0.9}, {"layers": 20.0}).metrics["accuracy"]
        0.9
    """

    name: str
    seconds: float
    metrics: dict[str, float]
    figures: dict[str, float]
    items: Sequence[ReportItem] = ()
    outcome: str = ""


@dataclass(frozen=True)
class QuantizationRun:
    """Outcome of ``run_stages``.

    Args:
        module: The quantized module.
        float_metrics: What the user's own validation logged for the float model.
        stages: Outcomes of the stages, in order.
        calibration_samples: Number of samples that were used.
        configuration: Settings of the run by name, for the report.
        example: A calibration batch, which exports are checked on; None if there was none.
        ran: The stages themselves, which may still keep on disk what a run that breaks off is resumed from.
        writes: Whether this process writes files and logs: of several that have run together, only the first does.
        exports: Reports of what was exported so far.
        run_further: Function that runs further stages on the same calibration and validation data, as ``run_stages``
            does.
        validation: What is known of the validation besides the values that it logs.
        work: What each layer does for one sample; None where it could not be counted.
        checkpoints: Files that ``save`` has written so far.

    Example:
        See ``run_stages``.
    """

    module: QuantizationModule
    float_metrics: dict[str, float]
    stages: list[StageOutcome]
    calibration_samples: int
    configuration: Mapping[str, Any] = field(default_factory=dict)
    example: Any = None
    ran: list[Stage] = field(default_factory=list)
    writes: bool = True
    exports: list[ExportReport] = field(default_factory=list)
    run_further: Callable[[Sequence[Stage]], "QuantizationRun"] | None = None
    validation: Validation = field(default_factory=Validation)
    work: Mapping[str, Work] | None = None
    checkpoints: list[Path] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """What validation logged after the last stage."""
        return self.stages[-1].metrics if self.stages else self.float_metrics

    def diagnose(self, **options: Any) -> DiagnosisResult:
        """Find out what each layer costs of the model's loss, why, and what can be done; apply remedies if asked.

        Goes through the calibration data once more. The report shows the diagnosis from then on. Where the run counted
        what mistakes cost (``DecisionCosts``), its ``Utility`` is the loss that layers cost, unless another is given.

        Args:
            **options: Arguments of ``Diagnosis``: ``apply=True``, ``max_degradation=0.01``, ``metric="val_acc"``, ...

        Raises:
            ValueError: If a value is out of its range, or the calibration data can be gone through only once.
            TypeError: If an option does not exist.
            MisconfigurationException: If remedies are to be applied and the run had no validation data.

        Example:
            See ``Diagnosis``.
        """
        utilities = [stage.utility for stage in self.ran if isinstance(stage, DecisionCosts)]
        if utilities and not options.keys() & {"loss", "options"}:
            options["loss"] = utilities[-1]
        stage = Diagnosis(**options)
        if self.run_further is None:
            raise ValueError("This run does not know its data: use run_stages(run.module, [Diagnosis()], loader, ...).")
        further = self.run_further([stage])
        before = sum(stage.name.split()[0] == "Diagnosis" for stage in self.stages)
        (outcome,) = further.stages
        self.stages.append(replace(outcome, name=f"{outcome.name} {before + 1}" if before else outcome.name))
        self.ran.append(stage)
        self.__dict__.pop("_items", None)
        assert stage.diagnosis is not None
        return stage.diagnosis

    def metric_or_first(self, metric: str | None) -> str | None:
        """The metric if validation logged it, else the first that it logged, if any; a wrong name costs no run."""
        if metric is not None and metric not in self.float_metrics:
            logged = ", ".join(self.float_metrics) or "nothing"
            log.warning("validation logged no %r, only %s: the report shows the first of these.", metric, logged)
        return metric if metric in self.float_metrics else next(iter(self.float_metrics), None)

    def record(self, recipe: str, model: str, metric: str | None, seed: int | None) -> dict[str, Any]:
        """The figures of the run as in ``result.json``, with the logged value named ``metric`` as the metric, or none.

        Raises:
            KeyError: If the validation logged no such value.
        """
        if metric is not None and metric not in self.float_metrics:
            raise KeyError(f"validation logged no {metric!r}, only {', '.join(self.float_metrics) or 'nothing'}.")
        stages = [
            StageRecord(
                stage.name,
                stage.seconds,
                stage.metrics.get(metric or ""),
                stage.figures,
                stage.metrics,
                stage.outcome,
            )
            for stage in self.stages
        ]
        network = self.module.network
        record = run_record(
            network,
            recipe,
            model,
            metric or "no metric",
            seed,
            self.calibration_samples,
            self.float_metrics.get(metric or ""),
            stages,
            [item.name for item in self.items],
            self.float_metrics,
            self.validation,
            None if self.work is None else bit_operations(network, self.work),
        )
        if self.exports:
            record["exports"] = [report.to_dict() for report in self.exports]
        if "weights" in self.configuration:
            record["weights"] = self.configuration["weights"]
        return record

    @property
    def items(self) -> list[ReportItem]:
        """Report items of the run: the layers as they are, those of the stages, the layers that lose most, and what was
        exported."""
        return [*self._items, *([export_item(self.exports)] if self.exports else [])]

    @cached_property
    def _items(self) -> list[ReportItem]:
        of_stages = [item for stage in self.stages for item in stage.items]
        network = self.module.network
        of_network = [shares_item(network), histograms_item(network)] if network.calibrated else []
        return [layers_item(network), *of_stages, *(item for item in of_network if item is not None)]

    def export_onnx(self, path: str | Path, **options: Any) -> ExportReport:
        """Write the quantized module as an ONNX file, checked on a calibration batch; the report shows it from then on.

        Args:
            path: File to write.
            **options: See ``export_onnx``.

        Raises:
            ValueError: If the target cannot run the module's formats; see ``export_onnx``.
        """
        report = export_onnx(self.module, path, self.example, **options)
        self.exports.append(report)
        return report

    def export_for_target(self, folder: str | Path) -> None:
        """Write ``model.onnx`` into a folder if the module was quantized for a target, see ``export_after``."""
        if self.module.network.scheme.target is not None:
            self.export_after(Path(folder) / "model.onnx")

    def export_after(self, path: str | Path) -> None:
        """Export at the end of a run, of which nothing may be lost: a failure is logged, and the checkpoint can still
        be exported.

        Args:
            path: File to write.
        """
        if not self.writes:
            return
        try:
            log.info("%s", self.export_onnx(path))
        except Exception as error:
            log.error(
                "%s was not written (%s: %s). The checkpoint was: load it, and call export_onnx.",
                path,
                type(error).__name__,
                error,
            )

    def save(self, path: str | Path, clean_up: bool = True) -> None:
        """Write the quantized checkpoint, for ``QuantizationModule.load_from_checkpoint(path, model=...)``, completely
        or not at all, and read it back.

        Args:
            path: File to write.
            clean_up: Whether what the stages have kept to be resumed from is removed then, see ``clean_up``.

        Raises:
            OSError: If it cannot be written, or reads differently.
        """
        if not self.writes:
            return
        with quiet_trainers():
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                plugins=[AtomicCheckpointIO()],
            )
        trainer.strategy.connect(self.module)
        trainer.save_checkpoint(path, weights_only=True)
        self.checkpoints.append(Path(path).absolute())
        if clean_up:
            self.clean_up()

    def clean_up(self) -> None:
        """Remove what the stages have kept in their state folder; from then on the run cannot be resumed."""
        for stage in self.ran if self.writes else ():
            stage.clean_up()

    def write_report(self, folder: str | Path, record: Mapping[str, Any]) -> None:
        """Write ``result.json``, ``report.html``, and each report item as CSV and, with matplotlib, as PNG.

        Args:
            folder: Folder to write to.
            record: From ``record``, with whatever else belongs into ``result.json``.
        """
        if not self.writes:
            return
        folder, items = Path(folder), self.items
        if self.checkpoints:
            record = {**record, "checkpoint": str(self.checkpoints[-1])}
        sections = [Section(item, open=item.name in ("layers", "diagnosis")) for item in items]
        record = {**record, "report_pages": pages_of(sections)}
        # What an earlier run has left here is not of this one.
        remove_previous_items(folder)
        write_record(folder / "result.json", record)
        for item in items:
            item.save(folder)
        stages = {outcome.name: stage for outcome, stage in zip(self.stages, self.ran, strict=False)}
        write_page(folder / "report.html", record, sections, run_settings(self.configuration, stages))

    def log(self, loggers: Iterable[Any], checkpoint: str | Path, prefix: str = "", step: int | None = None) -> None:
        """Give loggers what they take of the whole run: the layers, the worst of them, the checkpoint and
        exported files as artifacts.

        Args:
            loggers: Loggers of Lightning.
            checkpoint: File that ``save`` has written.
            prefix: Prefix of the keys.
            step: Step that the pictures are logged at; the number of stages if None.
        """
        loggers = list(loggers) if self.writes else []
        of_stages = [item.name for stage in self.stages for item in stage.items]
        of_run = [item for item in self.items if item.name not in of_stages]
        log_items(loggers, f"{prefix}run", of_run, len(self.stages) if step is None else step)
        for file in (Path(checkpoint), *(report.path for report in self.exports)):
            log_checkpoint(loggers, file)
