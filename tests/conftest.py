import io
import logging
import os
from pathlib import Path

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.resnet_cifar10.model import BasicBlock, ResNet

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# The tensors of most tests are too small for more threads to help; results must not depend on their number.
torch.set_num_threads(int(os.environ.get("CALIBTIP_TEST_THREADS", "1")))


@pytest.fixture
def one_thread():
    """PyTorch computes on the calling thread alone, also in processes that are forked."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TinyResNet(nn.Module):
    def __init__(self, channels: int = 6, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*(BasicBlock(channels, channels, 1) for _ in range(blocks)))
        self.head = nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class TinyClassifier(pl.LightningModule):
    """A user's LightningModule."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or TinyResNet()
        self.epoch_ends = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log_dict({"val_acc": (logits.argmax(1) == batch[1]).float().mean()})

    def on_validation_epoch_end(self):
        self.epoch_ends += 1
        self.log("epoch_ends", float(self.epoch_ends))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def randomize_batch_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Give BatchNorms statistics as if trained, so that folding has something to do."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.2, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Tests that export are skipped where torch is too old for that."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if str(error).startswith("Exporting needs torch"):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def same_log_levels():
    """Recipes set them for their process; the next test is not to see that."""
    loggers = [logging.getLogger(name) for name in ("lightning_calibtip", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tiny_resnet(generator: torch.Generator) -> nn.Module:
    torch.manual_seed(0)
    net = TinyResNet()
    randomize_batch_norms(net, generator)
    return net.eval()


@pytest.fixture
def tiny_classifier(tiny_resnet: nn.Module) -> TinyClassifier:
    return TinyClassifier(tiny_resnet)


@pytest.fixture
def images(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(48, 1, 8, 8, generator=generator)


@pytest.fixture
def loader(images: torch.Tensor) -> DataLoader:
    labels = torch.arange(len(images)) % 4
    return DataLoader(TensorDataset(images, labels), batch_size=16)


@pytest.fixture
def make_trainer(tmp_path: Path):
    def make(*callbacks: pl.Callback, **options) -> pl.Trainer:
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**{**defaults, "callbacks": list(callbacks), **options})

    return make


@pytest.fixture(scope="session")
def data_folder() -> Path:
    folder = Path(os.environ.get("CALIBTIP_TEST_DATA", "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set CALIBTIP_TEST_DATA to the folder with cifar10/ and imagenet/")
    return folder.resolve()


@pytest.fixture
def tiny_cifar(tmp_path):
    """Random images in the hub's parquet format."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 20)):
        rows = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        data = datasets.Dataset.from_dict({"image": rows, "label": [i % 10 for i in range(count)]}, features=features)
        data.to_parquet(tmp_path / f"{split}-small.parquet")
    return tmp_path


@pytest.fixture
def cifar_checkpoint(tmp_path):
    torch.manual_seed(0)
    net = ResNet(3)
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "resnet20.th")
    return tmp_path / "resnet20.th"
