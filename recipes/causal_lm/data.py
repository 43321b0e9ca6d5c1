"""Calibration and evaluation windows of a text."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from .text import read_text


class TextData(pl.LightningDataModule):
    """A text in windows of as many tokens each, one behind the other; what is left at the end is not used.

    Args:
        tokenizer: Tokenizer of the network.
        train: Text to calibrate on, see ``read_text``.
        validation: Text to evaluate on.
        calibration_samples: Number of windows to calibrate on, the first of the training text.
        window: Tokens of a window, at least 2.
        evaluation_windows: Most windows to evaluate on, the first of the text; all if None.
        split: ``"validation"`` to evaluate on the validation text; ``"train"`` on the windows of the training text that
            are not calibrated on, for choosing settings.
        batch_size: Windows of a batch.

    Raises:
        ValueError: If a number is too small, or a text holds fewer windows than are needed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: str,
        validation: str,
        calibration_samples: int = 64,
        window: int = 512,
        evaluation_windows: int | None = None,
        split: Literal["validation", "train"] = "validation",
        batch_size: int = 4,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("calibration_samples", calibration_samples, 1),
            ("window", window, 2),
            ("evaluation_windows", evaluation_windows, 1),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        self.tokenizer, self.train, self.validation = tokenizer, train, validation
        self.calibration_samples, self.window, self.evaluation_windows = calibration_samples, window, evaluation_windows
        self.split, self.batch_size = split, batch_size

    def setup(self, stage: str | None = None) -> None:
        """Read the texts and cut them into windows."""
        training = self._windows(self.train, "train")
        if len(training) < self.calibration_samples:
            raise ValueError(
                f"calibration_samples={self.calibration_samples}, but {self.train} holds {len(training)} windows of "
                f"{self.window} tokens; calibrate on fewer or shorter ones, or give more text."
            )
        self.calibration, rest = training[: self.calibration_samples], training[self.calibration_samples :]
        evaluation = self._windows(self.validation, "validation") if self.split == "validation" else rest
        if not len(evaluation):
            source = self.validation if self.split == "validation" else f"{self.train} beyond the calibration windows"
            raise ValueError(f"There is no window of {self.window} tokens to evaluate on in {source}.")
        self.evaluation = evaluation[: self.evaluation_windows]

    def _windows(self, source: str, split: str) -> Tensor:
        """Token ids, int64, shape (windows, tokens)."""
        ids = self.tokenizer(read_text(source, split), add_special_tokens=False, verbose=False).input_ids
        count = len(ids) // self.window
        return torch.tensor(ids[: count * self.window]).view(count, self.window)

    def train_dataloader(self) -> DataLoader[Any]:
        """Calibration batches: token ids, int64, shape (batch, tokens)."""
        return DataLoader(self.calibration, self.batch_size)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches to evaluate on, of the same shape."""
        return DataLoader(self.evaluation, self.batch_size)  # type: ignore[arg-type]
