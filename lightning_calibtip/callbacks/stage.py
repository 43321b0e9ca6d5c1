"""What all stages share: they run once, when the calibration epoch of a QuantizationModule ends."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from .. import ranks
from ..calibration.divergences import Divergence
from ..calibration.finite import require_finite_outputs
from ..calibration.progress import ProgressCallback, no_progress
from ..lightning_types import is_a, package_of
from ..module import QuantizationModule
from ..network.scheme import QuantizationScheme
from ..network.shared import take_states_of_first
from ..report.item import ReportItem
from ..report.loggers import log_items
from .progress import shows_progress, stage_progress

log = logging.getLogger(__name__)


def check_precision(name: str, trainer: pl.Trainer) -> None:
    """Refuse a Trainer whose weights are not float32, in which scales and zero points could not be kept.

    Args:
        name: Name of the callback, for the message.
        trainer: The Trainer.

    Raises:
        MisconfigurationException: If its precision is another one.

    Example:
        >>> check_precision("CalibTIP", pl.Trainer(accelerator="cpu", logger=False))
    """
    if trainer.precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise MisconfigurationException(
            f"{name} needs float32 weights, got Trainer(precision={trainer.precision!r}): use 32-true, 16-mixed or "
            "bf16-mixed."
        )


def check_strategy(name: str, trainer: pl.Trainer) -> None:
    """Refuse a Trainer that splits a model over processes: each has to have all of it.

    Args:
        name: Name of the callback, for the message.
        trainer: The Trainer.

    Raises:
        MisconfigurationException: If its strategy is another one than a single device or DDP, starts its processes by
            spawning or forking, or has several processes under ``pytorch_lightning``.

    Example:
        >>> check_strategy("CalibTIP", pl.Trainer(accelerator="cpu", logger=False))
    """
    if getattr(trainer.strategy, "_start_method", "popen") != "popen":
        raise MisconfigurationException(
            f"{name} cannot run in processes that are spawned or forked, whose results are lost at their end: use "
            'strategy="ddp" in a script, or one device in a notebook.'
        )
    if package_of(trainer.strategy) != "lightning" and trainer.world_size > 1:
        raise MisconfigurationException(
            f"{name} works in several processes only with the Trainer of the package lightning: import it from "
            "lightning.pytorch, or train with pytorch_lightning on one device."
        )
    if not (is_a(trainer.strategy, "SingleDeviceStrategy") or is_a(trainer.strategy, "DDPStrategy")):
        raise MisconfigurationException(
            f"{name} needs the whole model in each process, got strategy {type(trainer.strategy).__name__}: train with "
            'strategy="ddp" or on one device, or save the model and call lightning_calibtip.quantize(model, loader).'
        )


@dataclass(frozen=True)
class StageResult:
    """What a run of a stage has found.

    Args:
        figures: Single values by name; loggers get them.
        items: Tables and pictures for the report and for loggers.
        outcome: What became of the stage, in whole sentences for the report.

    Example:
        See ``Stage``.
    """

    figures: dict[str, float] = field(default_factory=dict)
    items: list[ReportItem] = field(default_factory=list)
    outcome: str = ""


class Stage(pl.Callback, ABC):
    """A step of post-training quantization as a callback: ``run`` does the work.

    Stages run in the order of the Trainer's callback list, all at the end of the one epoch that ``fit`` spends on the
    calibration data. ``result`` holds what the last run has found, which loggers get too, and ``seconds`` the time that
    it took. ``run`` may report to ``progress``, which the Trainer's progress bar shows; where the output goes to a
    file, there is one line at the end. ``evaluate``, a function without arguments that gives metrics of the model as it
    is, can be set for stages that compare several models; ``quantize`` sets it to the user's own validation, and
    ``watch_validation`` to a function that runs a callback along with it. A stage that can be resumed keeps what it has
    done in ``state_folder``, in which one process works at a time; one that compares the model's logits with the float
    ones says so by ``compares_logits``, and how by ``divergence``.

    Example:
        >>> class CountSamples(Stage):
        ...     def run(self, module):
        ...         return StageResult({"samples": float(module.calibration.samples)})
        >>> stage = CountSamples()
        >>> stage.name, stage.result.figures
        ('CountSamples', {})
    """

    state_folder: Path | None = None
    compares_logits = False
    divergence: Divergence | None = None

    def __init__(self) -> None:
        self.seconds = 0.0
        self.result = StageResult()
        self.progress: ProgressCallback = no_progress
        self.evaluate: Callable[[], Mapping[str, float]] | None = None
        self.watch_validation: Callable[[pl.Callback], object] | None = None

    @property
    def name(self) -> str:
        """Name in records and logs."""
        return type(self).__name__

    @property
    def figures(self) -> dict[str, float]:
        """Figures of the last run."""
        return self.result.figures

    @property
    def items(self) -> list[ReportItem]:
        """Report items of the last run."""
        return self.result.items

    @abstractmethod
    def run(self, module: QuantizationModule) -> StageResult:
        """Do the stage's work on a module whose calibration set is complete."""

    def check(self, scheme: QuantizationScheme) -> None:
        """Refuse, before anything runs, a scheme that the stage's options do not go with.

        Raises:
            ValueError: If they do not; the message names the option.
        """

    def check_plan(self, module: QuantizationModule) -> None:
        """Refuse, as soon as the first batch has shown which layers there are, what cannot be done with them.

        Raises:
            ValueError: If there is something, or the model's outputs do not fit the divergence; the message says what.
            TypeError: If the stage compares logits and the model's output has none.
        """
        if self.compares_logits:
            module.require_logits(self.divergence)

    def clean_up(self) -> None:
        """Remove what the stage has kept on disk for a run that breaks off; called when the run's result is written."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before anything runs: the module must be a QuantizationModule, whole in each process."""
        if stage != "fit":
            return
        if not isinstance(pl_module, QuantizationModule):
            raise MisconfigurationException(
                f"{self.name} works on a QuantizationModule, got {type(pl_module).__name__}: wrap your module, "
                "QuantizationModule(model, weight_bits=4, ...), or use the CalibTIP callback."
            )
        check_precision(self.name, trainer)
        self.check(pl_module.network.scheme)
        check_strategy(self.name, trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Called after each calibration batch; after the first one the layers are known."""
        assert isinstance(pl_module, QuantizationModule)
        if batch_idx == 0:
            self.check_plan(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when ``fit`` breaks off: the calibration batches are let go."""
        if isinstance(pl_module, QuantizationModule):
            pl_module.calibration.batches.clear()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when all calibration batches have been seen: run the stage and log what it has found."""
        assert isinstance(pl_module, QuantizationModule)
        if pl_module.calibration_done:
            # A Trainer with min_epochs goes on; the first epoch was the calibration.
            return
        started = time.monotonic()
        with (
            ranks.together(trainer.world_size > 1),
            trainer.precision_plugin.forward_context(),
            stage_progress(trainer, self.name) as self.progress,
        ):
            result = self.run(pl_module)
            # All ranks have done the same; should a device have rounded otherwise, they agree again.
            take_states_of_first(list(pl_module.network.layers.values()))
            if pl_module.network.calibrated:
                require_finite_outputs(pl_module.network, pl_module.calibration)
        self.progress = no_progress
        if not isinstance(result, StageResult):
            raise TypeError(f"{self.name}.run must return a StageResult(figures, items), got {type(result).__name__}.")
        self.result, self.seconds = result, time.monotonic() - started
        figures = {f"{self.name}/{key}": value for key, value in {**result.figures, "seconds": self.seconds}.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        log_items(trainer.loggers, self.name, result.items, trainer.global_step)
        line = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        tables = [f"\n{self.name}: {item.name}\n{item.text}\n" for item in result.items]
        for text in [*tables, line]:
            if log.isEnabledFor(logging.INFO):
                log.info(text)
            elif shows_progress(trainer):
                pl_module.print(text)
