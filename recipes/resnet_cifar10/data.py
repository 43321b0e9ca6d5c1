"""CIFAR-10 from the hub or from local parquet files, as tensors in memory."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CifarData(pl.LightningDataModule):
    """Calibration images from the training split, the whole test split for validation.

    Args:
        data: The hub's name of the dataset (``cifar10``), or a folder with ``train*.parquet`` and ``test*.parquet``.
        calibration_samples: Number of calibration images, the first ones of the training images.
        batch_size: Batch size of calibration.
        eval_batch_size: Batch size of validation.
        split: ``"test"`` to evaluate on the test images; ``"train"`` on the training images after the calibration ones,
            for choosing settings.

    Raises:
        ValueError: If there are fewer training images than asked for.
    """

    def __init__(
        self,
        data: str = "cifar10",
        calibration_samples: int = 1024,
        batch_size: int = 64,
        eval_batch_size: int = 250,
        split: str = "test",
    ) -> None:
        super().__init__()
        self.data, self.calibration_samples, self.split = data, calibration_samples, split
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size

    def setup(self, stage: str | None = None) -> None:
        """Read the images."""
        train = load_images(self.data, "train")
        if self.calibration_samples > len(train):
            raise ValueError(
                f"calibration_samples={self.calibration_samples}, but {self.data} has {len(train)} images."
            )
        self.calibration = TensorDataset(*train[: self.calibration_samples])
        rest = train[self.calibration_samples :]
        self.evaluation = TensorDataset(*(load_images(self.data, "test")[:] if self.split == "test" else rest))

    def train_dataloader(self) -> DataLoader[Any]:
        """Calibration batches."""
        return DataLoader(self.calibration, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches to evaluate on."""
        return DataLoader(self.evaluation, self.eval_batch_size)


def load_images(data: str, split: str) -> TensorDataset:
    """Normalised images (N, 3, 32, 32) and labels (N,).

    Raises:
        FileNotFoundError: If ``data`` is a folder without parquet files of the split.
    """
    from datasets import load_dataset

    folder = Path(data)
    if folder.is_dir():
        files = sorted(map(str, folder.glob(f"{split}*.parquet")))
        if not files:
            raise FileNotFoundError(f"{folder} has no {split}*.parquet; give a folder with CIFAR-10 parquet files.")
        dataset = load_dataset("parquet", data_files=files, split="train")
    else:
        dataset = load_dataset(data, split=split)
    column = "image" if "image" in dataset.column_names else "img"
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in dataset[column]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    labels: Tensor = torch.tensor(dataset["label"][:])
    return TensorDataset(images.contiguous(), labels)
