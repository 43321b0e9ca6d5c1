"""What is quantized: a trained network, its data, and what its mistakes cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from recipes.resnet_cifar10.data import load_images
from recipes.resnet_cifar10.model import CifarClassifier

from .networks import Classifier, cancer_network, digits_network

SUBJECTS = ("cancer", "digits", "cifar10")

# The test samples of scikit-learn's data are those at the end of a permutation of this seed.
_ORDER, _CANCER_TEST, _DIGITS_TEST = 0, 200, 798
# CIFAR-10: calibration images are drawn from the first training images; settings are chosen on those after them.
_CIFAR_POOL, _CIFAR_CALIBRATION = 3000, 512
_CIFAR_ANIMALS = (2, 3, 4, 5, 6, 7)


@dataclass(frozen=True)
class Subject:
    """A trained model with everything that a run needs.

    Args:
        name: One of ``SUBJECTS``.
        model: The trained model, which logs ``metric`` in validation.
        metric: Name of its accuracy.
        calibration: Calibration batches.
        evaluation: Batches to evaluate on, with labels.
        matrix: What mistakes cost, ``matrix[decision][truth]``.
    """

    name: str
    model: pl.LightningModule
    metric: str
    calibration: DataLoader[Any]
    evaluation: DataLoader[Any]
    matrix: list[list[float]]


def cost_matrix(name: str) -> list[list[float]]:
    """What mistakes cost.

    Breast cancer: 20 for a malignant tumour (class 0) taken for benign, 1 for a false alarm. Digits: 20 for a 0 that is
    read as another digit, 1 for every other mistake. CIFAR-10: 10 for an animal taken for a vehicle, 5 for a vehicle
    taken for an animal, 0.1 for a mistake among animals or among vehicles.

    Args:
        name: One of ``SUBJECTS``.
    """
    if name == "cancer":
        return [[0.0, 1.0], [20.0, 0.0]]
    matrix = torch.ones(10, 10)
    if name == "digits":
        matrix[:, 0] = 20
    else:
        animal = torch.zeros(10, dtype=torch.bool)
        animal[list(_CIFAR_ANIMALS)] = True
        matrix.fill_(0.1)
        matrix[~animal.unsqueeze(1) & animal] = 10
        matrix[animal.unsqueeze(1) & ~animal] = 5
    return [[round(cost, 6) for cost in row] for row in matrix.fill_diagonal_(0).tolist()]


def load_subject(name: str, seed: int, split: str = "test", data: str | None = None) -> Subject:
    """Train or load a network, and cut its data.

    Args:
        name: One of ``SUBJECTS``.
        seed: Random seed of training and of the order of training samples; for CIFAR-10 of the choice of calibration
            images.
        split: ``"test"`` to evaluate on the test samples; ``"train"`` on training samples that are neither trained nor
            calibrated on, for choosing settings.
        data: For CIFAR-10 a folder with ``train*.parquet``, ``test*.parquet`` and ``resnet20.pt``.

    Raises:
        ValueError: If the name is unknown, or CIFAR-10 has no folder.
    """
    if name not in SUBJECTS:
        raise ValueError(f"subject must be one of {', '.join(SUBJECTS)}, got {name!r}.")
    pl.seed_everything(seed, verbose=False)
    matrix = cost_matrix(name)
    if name == "cifar10":
        if data is None:
            raise ValueError("cifar10 needs data, a folder with train*.parquet, test*.parquet and resnet20.pt.")
        resnet = CifarClassifier("resnet20", Path(data) / "resnet20.pt")
        train, chosen = load_images(data, "train").tensors, torch.randperm(_CIFAR_POOL)[:_CIFAR_CALIBRATION]
        calibration = TensorDataset(*(each[chosen] for each in train))
        rest = TensorDataset(*(each[_CIFAR_POOL:] for each in train))
        evaluation = load_images(data, "test") if split == "test" else rest
        return Subject(name, resnet, "top1", DataLoader(calibration, 128), DataLoader(evaluation, 250), matrix)
    x, y, x_test, y_test = _cancer() if name == "cancer" else _digits()
    if split == "train":
        kept = (3 * len(x)) // 5
        x, y, x_test, y_test = x[:kept], y[:kept], x[kept:], y[kept:]
    if name == "cancer":
        mean, deviation = x.mean(0), x.std(0) + 1e-6
        x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    # Calibrated on all of them, of which some were not trained on: there the network's own doubt is an honest one.
    trained_on = torch.randperm(len(x))[: (7 * len(x)) // 10]
    net, decay, epochs, size = (cancer_network(), 1e-2, 30, 32) if name == "cancer" else (digits_network(), 0.0, 8, 50)
    model = Classifier(net, len(matrix), decay)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(x[trained_on], y[trained_on]), size, shuffle=True))
    calibration, evaluation = TensorDataset(x, y), TensorDataset(x_test, y_test)
    return Subject(name, model, "accuracy", DataLoader(calibration, 100), DataLoader(evaluation, 250), matrix)


def _shuffled(x: Tensor, y: Tensor, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples and labels to train on, and those of the test."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_ORDER))
    x, y = x[order], y[order]
    return x[:-test], y[:-test], x[-test:], y[-test:]


def _cancer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_breast_cancer()
    return _shuffled(torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target), _CANCER_TEST)


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return _shuffled(images, torch.tensor(data.target), _DIGITS_TEST)
