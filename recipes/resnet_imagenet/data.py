"""ImageNet images from a folder of images, local parquet files or the hub, prepared as the network was trained."""

import logging
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from .choice import choose_per_class, choose_samples
from .image_folder import FolderImages, check_same_classes
from .preprocessing import Preprocessing
from .rows import RowImages, hub_images, parquet_images

log = logging.getLogger(__name__)

_CALIBRATION_FILES, _EVALUATION_FILES = ("train*.parquet", "calib*.parquet"), ("val*.parquet", "eval*.parquet")
# The same images are evaluated whatever the run's seeds are.
_EVALUATION_SEED = 0


class ImageNetData(pl.LightningDataModule):
    """Calibration and evaluation images.

    Args:
        data: Folder with ``train/<class>`` and ``val/<class>`` full of images; folder with ``train*.parquet`` or
            ``calib*.parquet``, and ``val*.parquet`` or ``eval*.parquet``; or the hub's name of the dataset.
        prepare: Makes a tensor of an image.
        calibration_set: ``"samples"`` for ``calibration_samples`` images, ``"per_class"`` for one of each class.
        calibration_samples: Number of calibration images, drawn; None for all, in their order.
        calibration_seed: Random seed of the draw.
        split: ``"validation"`` to evaluate on the evaluation images; ``"train"`` on the calibration images that are not
            calibrated on, for choosing settings.
        limit_evaluation: Number of images to evaluate on, drawn, the same in each run; None for all.
        batch_size: Number of images in a batch.
        workers: Processes that decode images; 0 to do it in this one.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks files.
        ValueError: If there are fewer images than asked for, none is left to evaluate on, or a setting is out of its
            range.
    """

    def __init__(
        self,
        data: str | Path,
        prepare: Preprocessing,
        calibration_set: Literal["samples", "per_class"] = "samples",
        calibration_samples: int | None = None,
        calibration_seed: int = 0,
        split: Literal["validation", "train"] = "validation",
        limit_evaluation: int | None = None,
        batch_size: int = 25,
        workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if calibration_set not in ("samples", "per_class"):
            raise ValueError(f"calibration_set must be samples or per_class, got {calibration_set!r}.")
        if calibration_set == "per_class" and calibration_samples is not None:
            raise ValueError(
                f"calibration_set=per_class takes one image of each class: leave out "
                f"calibration_samples={calibration_samples}, or set calibration_set=samples."
            )
        self.batch_size, self.workers = batch_size, workers
        train = read_images(str(data), "train", prepare)
        self.labels_from_folders = isinstance(train, FolderImages)
        self.classes = max(train.labels, default=0) + 1
        chosen = (
            choose_per_class(train.labels, calibration_seed)
            if calibration_set == "per_class"
            else choose_samples(len(train), calibration_samples, calibration_seed, str(data))
        )
        log.info("calibrating on %d of %d images", len(chosen), len(train))
        self.calibration: Dataset[Any] = Subset(train, chosen)
        if split == "train":
            rest = sorted(set(range(len(train))) - set(chosen))
            if not rest:
                raise ValueError(
                    f"split=train evaluates on the images that are not among the {len(chosen)} calibrated on, but "
                    "there are no others; calibrate on fewer, or use split=validation."
                )
            evaluation: Dataset[Any] = Subset(train, rest)
        else:
            evaluation = read_images(str(data), "validation", prepare)
        self.evaluation = limited(evaluation, limit_evaluation)

    def train_dataloader(self) -> DataLoader[Any]:
        """Calibration batches."""
        return DataLoader(self.calibration, self.batch_size, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches to evaluate on."""
        return DataLoader(self.evaluation, self.batch_size, num_workers=self.workers)


def read_images(data: str, part: Literal["train", "validation"], prepare: Preprocessing) -> FolderImages | RowImages:
    """All images to calibrate on, or to evaluate on.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks files.
        ValueError: If the class folders to calibrate and to evaluate on differ, or a file is none of images.
    """
    folder = Path(data).expanduser()
    train, validation = folder / "train", folder / "val"
    if train.is_dir() or validation.is_dir():
        if part == "train":
            return FolderImages(train, prepare)
        check_same_classes(train, validation)
        return FolderImages(validation, prepare)
    if folder.is_dir():
        return parquet_images(folder, _CALIBRATION_FILES if part == "train" else _EVALUATION_FILES, prepare)
    # Names on the hub are name or user/name.
    if folder.exists() or folder.is_absolute() or data.startswith(".") or len(folder.parts) > 2:
        raise FileNotFoundError(
            f"There is no folder {data}; give one with images or parquet files, or the hub's imagenet-1k."
        )
    return hub_images(data, part, prepare)


def limited(images: Dataset[Any], count: int | None) -> Dataset[Any]:
    """A number of images, drawn: the first ones would be of a few classes only.

    Raises:
        ValueError: If ``count`` is below 1, or above the number of images.
    """
    if count is None:
        return images
    available = len(images)  # type: ignore[arg-type]
    if not 1 <= count <= available:
        raise ValueError(f"limit_evaluation={count}, but there are {available} images to evaluate on.")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(_EVALUATION_SEED))
    return Subset(images, sorted(order[:count].tolist()))
