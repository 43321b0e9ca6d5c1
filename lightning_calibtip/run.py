"""The outcome of a run: what was measured after each stage, and what it writes and shows."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from .callbacks.exhibits import log_checkpoint, log_exhibits
from .module import QuantizationModule
from .report.exhibit import Exhibit
from .report.histograms import histograms_exhibit
from .report.layers import layers_exhibit
from .report.page import Section, write_page
from .report.record import StageRecord, run_record, write_record

log = logging.getLogger(__name__)

# What the page calls an exhibit; others appear under their own names.
_TITLES = {
    "layers": "Layers",
    "reconstruction": "Error of each unit before and after AdaQuant",
    "histograms": "Weights and inputs of the layers that lose most",
    "allocation": "Widths chosen",
    "sensitivity": "Sensitivity of each layer",
    "trade_off": "Trade-off of size and loss",
}


@dataclass(frozen=True)
class StageOutcome:
    """What one stage of a run came to.

    Args:
        name: Of the stage.
        seconds: Without the evaluation after it.
        metrics: What the user's own validation logged after it.
        figures: What the stage itself measured.
        exhibits: What it has to show as tables and pictures.
    """

    name: str
    seconds: float
    metrics: dict[str, float]
    figures: dict[str, float]
    exhibits: Sequence[Exhibit] = ()


@dataclass(frozen=True)
class QuantizationRun:
    """Outcome of ``run_stages``.

    Args:
        module: The quantized module.
        float_metrics: What the user's own validation logged for the float model.
        stages: In order.
        calibration_samples: Number of samples that were used.
        configuration: Settings of the run, by name, for those who read of it later.
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

    def record(self, recipe: str, model: str, metric: str | None, seed: int) -> dict[str, Any]:
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
        )

    @cached_property
    def exhibits(self) -> list[Exhibit]:
        """What the run has to show: the layers as they are, what the stages showed, and the worst layers."""
        shown = [exhibit for stage in self.stages for exhibit in stage.exhibits]
        network = self.module.network
        return [layers_exhibit(network), *shown, *([histograms_exhibit(network)] if network.calibrated else [])]

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
        """Write ``result.json``, ``report.html``, and each exhibit as CSV and, with matplotlib, as PNG.

        Args:
            folder: Where to.
            record: From ``record``, with whatever else belongs into ``result.json``.
        """
        folder, exhibits = Path(folder), self.exhibits
        # What an earlier run has left here is not of this one.
        for path in [path for name in (*_TITLES, "reconstruction_w*") for path in folder.glob(f"{name}.*")]:
            if path.suffix in (".csv", ".png"):
                path.unlink()
        write_record(folder / "result.json", record)
        for exhibit in exhibits:
            exhibit.save(folder)
        sections = [
            Section(
                _TITLES.get(exhibit.name, exhibit.name.replace("_", " ").capitalize()),
                exhibit,
                open=exhibit.name == "layers",
            )
            for exhibit in exhibits
        ]
        write_page(folder / "report.html", record, sections, self.configuration)

    def log(self, loggers: Iterable[Any], checkpoint: str | Path, prefix: str = "", step: int | None = None) -> None:
        """Give loggers what they take of the whole run: the layers, the worst of them, the checkpoint as an artifact.

        Args:
            loggers: Lightning's.
            checkpoint: File that ``save`` has written.
            prefix: Of the keys.
            step: Of the pictures; the number of stages if None.
        """
        loggers = list(loggers)
        of_stages = [exhibit.name for stage in self.stages for exhibit in stage.exhibits]
        of_run = [exhibit for exhibit in self.exhibits if exhibit.name not in of_stages]
        log_exhibits(loggers, f"{prefix}run", of_run, len(self.stages) if step is None else step)
        log_checkpoint(loggers, Path(checkpoint))
