"""ResNet-20/32/44/56 for CIFAR-10 (He et al. 2015, section 4.2), with option A shortcuts.

Parameter names are those of the public checkpoints of ``akamaster/pytorch_resnet_cifar10``.
"""

from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels; no parameters."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + new_channels, H / 2, W / 2)."""
        before = self.new_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Sequential() if same else PadShortcut(channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """The network: one convolution, three stages of ``blocks`` blocks, one linear layer."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, 10)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.shape[-1]).flatten(1)
        return self.linear(out)


class CifarClassifier(pl.LightningModule):
    """The LightningModule around it, as a user would write it: logs ``top1`` in validation.

    Args:
        name: ``resnet20``, ``resnet32``, ``resnet44`` or ``resnet56``.
        checkpoint: File with ``{"state_dict": ...}``; None for random weights.

    Raises:
        ValueError: If the name is unknown, or the checkpoint is of another network.
        FileNotFoundError: If there is no checkpoint.
    """

    def __init__(self, name: str, checkpoint: Path | None = None) -> None:
        super().__init__()
        if name not in DEPTHS:
            raise ValueError(f"model must be one of {', '.join(DEPTHS)}, got {name!r}.")
        self.net = ResNet(DEPTHS[name])
        self.top1 = MulticlassAccuracy(num_classes=10, average="micro")
        if checkpoint is not None:
            self._load(name, checkpoint)

    def _load(self, name: str, checkpoint: Path) -> None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        # The public files were saved from a DataParallel model.
        state = {key.removeprefix("module."): value for key, value in state.items()}
        try:
            self.net.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint} is not a checkpoint of {name}; check --model. {error}") from error

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.net(x)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the right answers of a batch."""
        images, labels = batch
        self.top1(self(images), labels)
        self.log("top1", self.top1, on_epoch=True)
