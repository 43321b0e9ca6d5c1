"""What all stages share: they run once, when the calibration epoch of a QuantizationModule ends."""

import logging
import time
from abc import ABC, abstractmethod

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ..calibration.steps import Steps, untold
from ..module import QuantizationModule
from ..report.exhibit import Exhibit
from .exhibits import log_exhibits
from .progress import shows_progress, stage_progress

log = logging.getLogger(__name__)


def check_precision(name: str, trainer: pl.Trainer) -> None:
    """Refuse a Trainer whose weights are not float32, in which scales and zero points could not be kept."""
    if trainer.precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise MisconfigurationException(
            f"{name} needs float32 weights, got Trainer(precision={trainer.precision!r}): use 32-true, 16-mixed or "
            "bf16-mixed."
        )


class Stage(pl.Callback, ABC):
    """A step of post-training quantization as a callback: ``run`` does the work.

    Stages run in the order of the Trainer's callback list, all at the end of the one epoch that ``fit`` spends on the
    calibration data. ``seconds`` says how long the last run took, ``figures`` what it found,
    ``exhibits`` what it has to show as tables and pictures; loggers get them all. ``run`` tells ``steps`` how far it
    is, which the Trainer's progress bar shows; where the output goes to a file, there is one line at the end.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.figures: dict[str, float] = {}
        self.exhibits: list[Exhibit] = []
        self.steps: Steps = untold

    @property
    def name(self) -> str:
        """Name in records and logs."""
        return type(self).__name__

    @abstractmethod
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Do the stage's work on a module whose calibration set is complete.

        Returns:
            Figures to log, by name.
        """

    def clean_up(self) -> None:
        """Remove what the stage has kept on disk for a run that breaks off; called when the whole run is over."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before anything runs: the module must be a QuantizationModule, on one process."""
        if stage != "fit":
            return
        if not isinstance(pl_module, QuantizationModule):
            raise MisconfigurationException(
                f"{self.name} works on a QuantizationModule, got {type(pl_module).__name__}: wrap your module, "
                "QuantizationModule(model, weight_bits=4, ...), or use the CalibTIP callback."
            )
        check_precision(self.name, trainer)
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"{self.name} runs on one process, got {trainer.world_size}: quantize with Trainer(devices=1)."
            )

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when all calibration batches have been seen: run the stage and log its figures."""
        assert isinstance(pl_module, QuantizationModule)
        if pl_module.calibration_done:
            # A Trainer with min_epochs goes on; the first epoch was the calibration.
            return
        started = time.monotonic()
        with trainer.precision_plugin.forward_context(), stage_progress(trainer, self.name) as self.steps:
            self.figures = self.run(pl_module)
        self.steps = untold
        self.seconds = time.monotonic() - started
        figures = {f"{self.name}/{key}": value for key, value in {**self.figures, "seconds": self.seconds}.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        log_exhibits(trainer.loggers, self.name, self.exhibits, trainer.global_step)
        line = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        tables = [f"\n{self.name}: {exhibit.name}\n{exhibit.text}\n" for exhibit in self.exhibits]
        for text in [*tables, line]:
            if log.isEnabledFor(logging.INFO):
                log.info(text)
            elif shows_progress(trainer):
                pl_module.print(text)
