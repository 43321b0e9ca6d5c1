"""Quantize a CIFAR-10 ResNet: ``python -m recipes.resnet_cifar10 --help`` lists the options."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import auto_cli

from lightning_calibtip import quantize
from recipes.output import make_logger, progress_options, set_up_logging, state_folder, write_run

from .data import CifarData
from .model import CifarClassifier


def main(
    checkpoint: Path,
    data: str = "cifar10",
    model: Literal["resnet20", "resnet32", "resnet44", "resnet56"] = "resnet20",
    pipeline: Literal["calibrate", "light", "advanced", "sequential", "mixed"] = "sequential",
    weight_bits: int = 4,
    activation_bits: int = 4,
    edge_bits: int | None = 8,
    compression: float | list[float] | None = None,
    candidates: list[int | list[int]] | None = None,
    observer: Literal["minmax", "moving_average", "percentile", "mse", "lp"] = "mse",
    calibration_samples: int = 1024,
    split: Literal["test", "train"] = "test",
    adaquant: dict[str, Any] | None = None,
    preparation: dict[str, Any] | None = None,
    allocation: dict[str, Any] | None = None,
    bias_tuning: dict[str, Any] | None = None,
    activation_budget: str | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    logger: Literal["wandb", "csv", "none"] = "none",
    output: Path = Path("runs/resnet_cifar10"),
) -> None:
    """Quantize a CIFAR-10 ResNet by a CalibTIP pipeline and write result.json and quantized.ckpt.

    A run that was killed and is started again with the same output folder goes on where it was.

    Args:
        checkpoint: File with the trained weights, named as in akamaster/pytorch_resnet_cifar10.
        data: The hub's cifar10, or a folder with train*.parquet and test*.parquet.
        model: Architecture.
        pipeline: Which stages run.
        weight_bits: Width of weights.
        activation_bits: Width of activations.
        edge_bits: Width of the first and last layer; null to treat them like the rest.
        compression: Size budget of light, advanced and mixed: weight bits over 32 bits a weight, 0.13
            if not given; a list for a sweep.
        candidates: Widths that light, advanced and mixed choose from, e.g. [4, 8] or [[4, 8], [8, 8]]; 4 and 8 if not
            given.
        observer: How ranges are chosen.
        calibration_samples: Number of training images to calibrate on.
        split: Evaluate on the test images, or on the training images that are not calibrated on (to choose settings).
        adaquant: Further arguments of AdaQuant.
        preparation: Further arguments of the AdaQuant that prepares the candidates of mixed.
        allocation: Further arguments of BitAllocation.
        bias_tuning: Further arguments of BiasTuning.
        activation_budget: Memory for captured activations, e.g. 2GB; the rest lies on disk.
        seed: Of everything random.
        accelerator: Of the Trainer: cpu, gpu, auto, ...
        logger: Where metrics go besides the output folder.
        output: Folder for the results.
    """
    configuration = dict(locals())
    set_up_logging()
    pl.seed_everything(seed, verbose=False)
    trained = CifarClassifier(model, checkpoint)
    images = CifarData(data, calibration_samples, split=split)
    images.setup()
    run_logger = make_logger(logger, output, "calibtip-resnet-cifar10")
    run = quantize(
        trained,
        images.train_dataloader(),
        images.val_dataloader(),
        pipeline,
        stage_options={
            "compression": compression,
            "candidates": candidates or [4, 8],
            "observer": observer,
            "adaquant": adaquant,
            "preparation": preparation,
            "allocation": allocation,
            "bias_tuning": bias_tuning,
            "activation_budget": activation_budget,
            "state_folder": state_folder(output),
            "seed": seed,
        },
        trainer_options={"accelerator": accelerator, "logger": run_logger, **progress_options()},
        configuration=configuration,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
    )
    write_run(run, run.record("resnet_cifar10", model, "top1", seed), output, run_logger)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
