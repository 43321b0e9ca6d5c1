"""Runs in one process or several: ``python -m tests.pipeline.distributed_runs <what> <folder> <devices>``."""

import logging
import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibtip import AdaQuant, Calibration, CalibTIP, QuantizationModule, quantize
from lightning_calibtip.reconstruction import adaquant as whole_model
from tests.conftest import TinyClassifier

OPTIONS = {
    "adaquant": {"iterations": 12, "batch_size": 16},
    "preparation": {"iterations": 5},
    "bias_tuning": {"epochs": 1},
    "allocation": {"compression": 0.2, "candidates": [4, 8]},
}
SCHEME = {"weight_bits": 4, "activation_bits": 4}
PIPELINES = ("calibrate", "light", "advanced", "sequential")


def data(shuffle: bool = False) -> DataLoader:
    images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.arange(48) % 4), batch_size=8, shuffle=shuffle)


def model() -> TinyClassifier:
    torch.manual_seed(0)
    return TinyClassifier()


def options_of(devices: int) -> dict:
    return {"accelerator": "cpu", **({"devices": devices, "strategy": "ddp"} if devices > 1 else {})}


def run_pipelines(folder: Path, devices: int, pipelines=PIPELINES) -> None:
    """Every pipeline, each with a checkpoint; its data are another permutation on each rank."""
    for pipeline in pipelines:
        loader = data()
        if os.environ.get("LOCAL_RANK", "0") != "0":
            loader = list(loader)[::-1]
        outcome = quantize(model(), loader, data(), pipeline, OPTIONS, trainer_options=options_of(devices), **SCHEME)
        outcome.save(folder / f"{pipeline}.ckpt")
        outcome.write_report(folder / pipeline, outcome.record("distributed", "tiny", "val_acc", 0))


def train(folder: Path, devices: int) -> None:
    """A training that ends with the callback."""
    callback = CalibTIP("sequential", OPTIONS, calibration_samples=24, target=None, **SCHEME)
    trainer = pl.Trainer(
        max_epochs=1, default_root_dir=folder, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, **options_of(devices),
    )  # fmt: skip
    trainer.fit(model(), data(shuffle=True), data())
    print(f"rank {trainer.global_rank}: {[stage.name for stage in callback.result.stages]}", flush=True)


def stages(folder: Path, devices: int) -> None:
    """A Trainer of the user's own, whose sampler gives each rank other samples."""
    module = QuantizationModule(model(), **SCHEME)
    trainer = pl.Trainer(
        callbacks=[Calibration(), AdaQuant(iterations=4)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, **options_of(devices),
    )  # fmt: skip
    trainer.fit(module, data())
    trainer.save_checkpoint(folder / "stages.ckpt", weights_only=True)
    observed = module.network.layers["net.head"].tensors[0].observer
    ends = [round(float(end), 6) for end in observed.row[1:3]]
    samples = int(observed.row[3:].sum()) // 6
    print(f"rank {trainer.global_rank}: {ends} of {samples} samples", flush=True)


def die(folder: Path, devices: int) -> None:
    """Rank 1 is killed when the third unit is reconstructed."""
    reconstruct, calls = whole_model.reconstruct, []

    def counting(*args):
        calls.append(None)
        if len(calls) == 3 and os.environ.get("LOCAL_RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return reconstruct(*args)

    whole_model.reconstruct = counting
    resume(folder, devices)


def resume(folder: Path, devices: int) -> None:
    """The same run, or what is left of it."""
    options, trainer_options = {**OPTIONS, "state_folder": folder / "state"}, options_of(devices)
    if devices > 1:
        trainer_options["strategy"] = DDPStrategy(timeout=timedelta(seconds=300))
    outcome = quantize(model(), data(), None, "sequential", options, trainer_options=trainer_options, **SCHEME)
    outcome.save(folder / "resumed.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    what, folder, devices = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    {"pipelines": run_pipelines, "train": train, "stages": stages, "die": die, "resume": resume}[what](folder, devices)
