"""The outcome of a run: what was measured after each stage, and what it writes and shows."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from ..module import QuantizationModule
from ..report.histograms import histograms_item
from ..report.item import ReportItem
from ..report.layers import layers_item
from ..report.loggers import log_checkpoint, log_items
from ..report.page import Section, write_page
from ..report.record import StageRecord, remove_previous_items, run_record, write_record

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

    Example:
        >>> StageOutcome("Calibration", 1.5, {"accuracy": 0.9}, {"layers": 20.0}).metrics["accuracy"]
        0.9
    """

    name: str
    seconds: float
    metrics: dict[str, float]
    figures: dict[str, float]
    items: Sequence[ReportItem] = ()


@dataclass(frozen=True)
class QuantizationRun:
    """Outcome of ``run_stages``.

    Args:
        module: The quantized module.
        float_metrics: What the user's own validation logged for the float model.
        stages: Outcomes of the stages, in order.
        calibration_samples: Number of samples that were used.
        configuration: Settings of the run by name, for the report.

    Example:
        See ``run_stages``.
    """

    module: QuantizationModule
    float_metrics: dict[str, float]
    stages: list[StageOutcome]
    calibration_samples: int
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """What validation logged after the last stage."""
        return self.stages[-1].metrics if self.stages else self.float_metrics

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
            StageRecord(stage.name, stage.seconds, stage.metrics.get(metric or ""), stage.figures)
            for stage in self.stages
        ]
        return run_record(
            self.module.network,
            recipe,
            model,
            metric or "no metric",
            seed,
            self.calibration_samples,
            self.float_metrics.get(metric or ""),
            stages,
            [item.name for item in self.items],
        )

    @cached_property
    def items(self) -> list[ReportItem]:
        """Report items of the run: the layers as they are, those of the stages, and the layers that lose most."""
        of_stages = [item for stage in self.stages for item in stage.items]
        network = self.module.network
        return [layers_item(network), *of_stages, *([histograms_item(network)] if network.calibrated else [])]

    def save(self, path: str | Path) -> None:
        """Write the quantized checkpoint, for ``QuantizationModule.load_from_checkpoint(path, model=...)``."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.strategy.connect(self.module)
        trainer.save_checkpoint(path, weights_only=True)

    def write_report(self, folder: str | Path, record: Mapping[str, Any]) -> None:
        """Write ``result.json``, ``report.html``, and each report item as CSV and, with matplotlib, as PNG.

        Args:
            folder: Folder to write to.
            record: From ``record``, with whatever else belongs into ``result.json``.
        """
        folder, items = Path(folder), self.items
        # What an earlier run has left here is not of this one.
        remove_previous_items(folder)
        write_record(folder / "result.json", record)
        for item in items:
            item.save(folder)
        sections = [Section(item, open=item.name == "layers") for item in items]
        write_page(folder / "report.html", record, sections, self.configuration)

    def log(self, loggers: Iterable[Any], checkpoint: str | Path, prefix: str = "", step: int | None = None) -> None:
        """Give loggers what they take of the whole run: the layers, the worst of them, the checkpoint as an artifact.

        Args:
            loggers: Loggers of Lightning.
            checkpoint: File that ``save`` has written.
            prefix: Prefix of the keys.
            step: Step that the pictures are logged at; the number of stages if None.
        """
        loggers = list(loggers)
        of_stages = [item.name for stage in self.stages for item in stage.items]
        of_run = [item for item in self.items if item.name not in of_stages]
        log_items(loggers, f"{prefix}run", of_run, len(self.stages) if step is None else step)
        log_checkpoint(loggers, Path(checkpoint))
