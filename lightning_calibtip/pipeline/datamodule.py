"""The user's DataModule in evaluations that are given their dataloaders."""

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override


class KnowsDataModule(pl.Callback):
    """Lets a validation step find the DataModule of its training, ``self.trainer.datamodule``, in another Trainer.

    That Trainer neither sets the DataModule up nor tears it down.

    Args:
        datamodule: The DataModule.

    Example:
        >>> KnowsDataModule(None).datamodule is None
        True
    """

    def __init__(self, datamodule: Any) -> None:
        self.datamodule = datamodule

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the first validation batch."""
        trainer.datamodule = self.datamodule  # type: ignore[attr-defined]

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last validation batch."""
        trainer.datamodule = None  # type: ignore[attr-defined]

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when a validation breaks off."""
        trainer.datamodule = None  # type: ignore[attr-defined]
