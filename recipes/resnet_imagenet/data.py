"""ImageNet images from local parquet files, prepared as the network was trained on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

_CALIBRATION_FILES, _EVALUATION_FILES = ("train*.parquet", "calib*.parquet"), ("val*.parquet", "eval*.parquet")


class ParquetImages(Dataset[tuple[Tensor, int]]):
    """Images (3, size, size) and labels of parquet files with the columns ``image`` and ``label``.

    Args:
        folder: Where the files are.
        patterns: Of their names.
        size: Side of the central crop in pixels; the shorter side is resized to ``size / 0.875`` before.
        mean: Of each channel, for pixels from 0 to 1.
        std: Of each channel.

    Raises:
        FileNotFoundError: If no file matches.
    """

    def __init__(
        self, folder: Path, patterns: Sequence[str], size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        from datasets import load_dataset

        files = sorted(str(path) for pattern in patterns for path in folder.glob(pattern))
        if not files:
            raise FileNotFoundError(f"{folder} has no {' or '.join(patterns)}; give a folder with parquet files.")
        self.rows = load_dataset("parquet", data_files=files, split="train")
        self.prepare = transforms.Compose(
            [
                transforms.Resize(round(size / 0.875), InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return self.prepare(row["image"].convert("RGB")), row["label"]


class ImageNetData(pl.LightningDataModule):
    """Calibration and evaluation images.

    Args:
        data: Folder with ``train*.parquet`` or ``calib*.parquet``, and ``val*.parquet`` or ``eval*.parquet``.
        size: See ``ParquetImages``.
        mean: See ``ParquetImages``.
        std: See ``ParquetImages``.
        calibration_samples: The first so many calibration images; None for all.
        split: ``"validation"`` to evaluate on the evaluation images; ``"train"`` on the calibration images after those
            that are calibrated on, for choosing settings.
        batch_size: Of both.

    Raises:
        ValueError: If there are fewer images than asked for, or none is left to evaluate on.
    """

    def __init__(
        self,
        data: Path,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        calibration_samples: int | None = None,
        split: str = "validation",
        batch_size: int = 25,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        train = ParquetImages(data, _CALIBRATION_FILES, size, mean, std)
        count = len(train) if calibration_samples is None else calibration_samples
        if not 1 <= count <= len(train):
            raise ValueError(f"calibration_samples={count}, but {data} has {len(train)} calibration images.")
        if split == "train" and count == len(train):
            raise ValueError(f"split=train evaluates on the images after the first {count}, but there are no others.")
        # Decoded once: every stage runs them again.
        self.calibration: Dataset[Any] = torch.utils.data.TensorDataset(
            torch.stack([train[i][0] for i in range(count)])
        )
        self.evaluation: Dataset[Any] = (
            torch.utils.data.Subset(train, range(count, len(train)))
            if split == "train"
            else ParquetImages(data, _EVALUATION_FILES, size, mean, std)
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Calibration batches."""
        return DataLoader(self.calibration, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches to evaluate on."""
        return DataLoader(self.evaluation, self.batch_size)
