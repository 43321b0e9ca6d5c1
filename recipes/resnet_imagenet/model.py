"""A network trained on ImageNet as the LightningModule that a user would write."""

import difflib
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from . import efficientnet_lite, torchvision_networks
from .own_network import load_own_network
from .preprocessing import Preprocessing


class ImageNetClassifier(pl.LightningModule):
    """Logs ``top1`` in validation; ``preprocessing`` is that of the images it was trained on.

    Args:
        name: See ``load_network``.
        weights: See ``load_network``.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        self.name = name
        self.net, self.preprocessing = load_network(name, weights)
        self.top1 = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        return logits_of(self.net(x))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the right answers of a batch."""
        images, labels = batch
        self.top1(self(images).argmax(1) == labels)
        self.log("top1", self.top1, on_epoch=True, batch_size=len(labels))

    @torch.no_grad()
    def count_classes(self) -> int:
        """Run one empty image and count the logits.

        Raises:
            ValueError: If the network cannot take images of this size.
        """
        size = self.preprocessing.crop
        self.eval()
        try:
            logits = self(torch.zeros(1, 3, size, size))
        except RuntimeError as error:
            raise ValueError(
                f"{self.name} cannot process images of {size} x {size} pixels: {error}. Check --image_size."
            ) from error
        if logits.ndim != 2:
            raise ValueError(f"{self.name} must return logits (images, classes), got shape {tuple(logits.shape)}.")
        return logits.shape[1]


def load_network(name: str, weights: str | None = None) -> tuple[nn.Module, Preprocessing]:
    """A network and the preprocessing of its images.

    Args:
        name: A classification network of torchvision, ``efficientnet_lite0`` to ``efficientnet_lite2``, or
            ``module:callable``.
        weights: See ``load_torchvision``, ``load_efficientnet_lite`` and ``load_own_network``.

    Raises:
        ValueError: If the name is unknown; and what these functions raise.
    """
    if ":" in name:
        return load_own_network(name, weights), Preprocessing()
    if name in efficientnet_lite.SIZES:
        return efficientnet_lite.load_efficientnet_lite(name, weights)
    known = torchvision_networks.names()
    if name in known:
        return torchvision_networks.load_torchvision(name, weights)
    close = difflib.get_close_matches(name, [*known, *efficientnet_lite.SIZES])
    raise ValueError(
        "model must be a classification network of torchvision (resnet18, mobilenet_v2, inception_v3, ...), one of "
        f"{', '.join(efficientnet_lite.SIZES)}, or module:callable, got {name!r}"
        f"{'; close to it: ' + ', '.join(close) if close else ''}."
    )


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returns: itself, the entry ``logits``, or the first of several.

    Raises:
        TypeError: If there is no tensor.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"The network must return logits, or something with logits, or a tuple that begins with them, not "
            f"{type(output).__name__}."
        )
    return logits
