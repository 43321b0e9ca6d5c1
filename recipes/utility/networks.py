"""Small residual networks of many layers, as ordinary LightningModules."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from recipes.quickstart.digits import Residual


class DenseResidual(nn.Module):
    """Two linear layers around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) to the same shape."""
        return F.relu(x + self.linear2(F.relu(self.linear1(x))))


def cancer_network(width: int = 16, blocks: int = 6) -> nn.Sequential:
    """30 measurements to 2 logits."""
    residuals = [DenseResidual(width) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(30, width), nn.ReLU(), *residuals, nn.Linear(width, 2))


def digits_network(channels: int = 8, blocks: int = 7) -> nn.Sequential:
    """Images of 8 x 8 to 10 logits."""
    residuals = [Residual(channels) for _ in range(blocks)]
    stem = [nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*stem, *residuals, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


class Classifier(pl.LightningModule):
    """An ordinary LightningModule: nothing in it knows of quantization or of costs.

    Args:
        net: The network.
        classes: Number of classes.
        weight_decay: Weight decay of AdamW.
        learning_rate: Learning rate of AdamW.
    """

    def __init__(self, net: nn.Module, classes: int, weight_decay: float = 0.0, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.net, self.weight_decay, self.learning_rate = net, weight_decay, learning_rate
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Samples to logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the right answers of a batch."""
        x, y = batch
        self.accuracy(self(x), y)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
