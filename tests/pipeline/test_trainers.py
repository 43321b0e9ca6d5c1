"""CalibTIP and quantize under Trainers of either package, and with unusual options and data."""

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_calibtip import Calibration, CalibTIP, QuantizationModule, quantize

QUIET = {
    "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False
}  # fmt: skip


class Points(pytorch_lightning.LightningDataModule):
    """Points of two classes, which a hook of the DataModule moves to where the model expects them."""

    def setup(self, stage=None):
        labels = torch.arange(48) % 2
        self.points = TensorDataset(torch.randn(48, 6) + labels[:, None] * 2 - 5, labels)

    def train_dataloader(self):
        return DataLoader(self.points, 16)

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 5, batch[1]]


class Classifier(pytorch_lightning.LightningModule):
    """A module of the other package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        # What a user's step may ask for.
        assert self.trainer is not None and self.current_epoch >= 0
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


def test_modules_and_data_of_pytorch_lightning_go_through_all_ways(tmp_path):
    pl.seed_everything(0, verbose=False)
    model, data = Classifier(), Points()
    callback = CalibTIP("calibrate", calibration_samples=32)
    options = {**QUIET, "max_epochs": 8, "default_root_dir": tmp_path, "callbacks": [callback]}
    trainer = pytorch_lightning.Trainer(**options)
    trainer.fit(model, datamodule=data)
    # Its hook has been at work: without it the classes are not to be told apart.
    trained = float(trainer.callback_metrics["val_acc"])
    assert trained > 0.9 and callback.result.float_metrics["val_acc"] == pytest.approx(trained)
    assert callback.checkpoint_path.exists() and callback.result.metrics["val_acc"] > 0.9
    loaded = QuantizationModule.load_from_checkpoint(callback.checkpoint_path, model=model)
    loaded.take_batch_hooks(data)
    trainer = pl.Trainer(**QUIET)
    assert trainer.validate(loaded, data.val_dataloader(), verbose=False)[0]["val_acc"] > 0.9
    module = QuantizationModule(model)
    module.take_batch_hooks(data)
    pl.Trainer(**QUIET, callbacks=[Calibration()], enable_checkpointing=False).fit(module, data.train_dataloader())
    assert trainer.validate(module, data.val_dataloader(), verbose=False)[0]["val_acc"] > 0.9
    loader = [(points + 5, labels) for points, labels in data.train_dataloader()]
    run = quantize(
        model, loader, DataLoader(loader, batch_size=None), "calibrate", trainer_options={"accelerator": "cpu"}
    )
    assert run.metrics["val_acc"] > 0.9


def test_several_processes_of_pytorch_lightning_are_refused_before_training():
    trainer = pytorch_lightning.Trainer(**{**QUIET, "strategy": "ddp", "devices": 2})
    with pytest.raises(MisconfigurationException, match="only with the Trainer of the package lightning"):
        CalibTIP("calibrate").setup(trainer, Classifier(), "fit")


class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            yield torch.randn(1, 8, 8, generator=generator), 1


@pytest.mark.parametrize(
    "options",
    [{"barebones": True}, {"inference_mode": False}, {"use_distributed_sampler": False}, {"fast_dev_run": True}],
    ids=lambda options: next(iter(options)),
)
def test_unusual_trainers_quantize_after_training(options, tiny_classifier, loader, tmp_path):
    callback = CalibTIP("calibrate", calibration_samples=32)
    settings = {**QUIET, "default_root_dir": tmp_path, **options, "callbacks": [callback]}
    if "barebones" in options:
        settings = {"barebones": True, "max_epochs": 1, "accelerator": "cpu", "callbacks": [callback]}
        settings["default_root_dir"] = tmp_path
    pl.Trainer(**settings).fit(tiny_classifier, loader, loader)
    if "fast_dev_run" in options:
        with pytest.raises(AttributeError, match="not under fast_dev_run"):
            _ = callback.result
        return
    assert callback.result.calibration_samples == 32 and callback.checkpoint_path.exists()


def test_iterable_data_and_several_validation_loaders_are_taken(tiny_classifier, loader, tmp_path):
    callback = CalibTIP("calibrate", calibration_samples=20)
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[callback])
    trainer.fit(tiny_classifier, DataLoader(Stream(), batch_size=10), [loader, loader])
    assert callback.result.calibration_samples == 20
    assert {name.rpartition("/")[2] for name in callback.result.metrics if name.startswith("val_acc")} == {
        "dataloader_idx_0", "dataloader_idx_1"
    }  # fmt: skip
