"""Quantize a CIFAR-10 ResNet: ``python -m recipes.resnet_cifar10 --help`` lists the options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_calibtip import PipelineOptions, QuantizationScheme, quantize
from lightning_calibtip.pipeline.presets import PipelineName
from recipes.command_line import run_recipe
from recipes.output import make_logger, progress_options, run_settings, set_up_logging, with_state_folder, write_run

from .data import CifarData
from .model import CifarClassifier

# What runs where nothing else is given.
SCHEME = QuantizationScheme(weight_bits=4, activation_bits=4, target="onnxruntime")
OPTIONS = PipelineOptions(seed=0)


def main(
    checkpoint: Path,
    data: str = "cifar10",
    model: Literal["resnet20", "resnet32", "resnet44", "resnet56"] = "resnet20",
    pipeline: PipelineName = "sequential",
    calibration_samples: int = 1024,
    split: Literal["test", "train"] = "test",
    accelerator: str = "auto",
    logger: Literal["wandb", "csv", "none"] = "none",
    output: Path = Path("runs/resnet_cifar10"),
    scheme: QuantizationScheme = SCHEME,
    options: PipelineOptions | Mapping[str, Any] = OPTIONS,
) -> None:
    """Quantize a CIFAR-10 ResNet by a CalibTIP pipeline and write result.json and quantized.ckpt.

    A run that was killed and is started again with the same output folder is resumed.

    Args:
        checkpoint: File with the trained weights, named as in akamaster/pytorch_resnet_cifar10.
        data: The hub's cifar10, or a folder with train*.parquet and test*.parquet.
        model: Architecture.
        pipeline: Which stages run.
        calibration_samples: Number of training images to calibrate on.
        split: Evaluate on the test images, or on the training images that are not calibrated on (to choose settings).
        accelerator: Accelerator of the Trainer: cpu, gpu, auto, ...
        logger: Where metrics go besides the output folder.
        output: Folder for the results.
        scheme: Bit-widths and number formats.
        options: Options of the stages, or a nested mapping of those that differ from the stages' own defaults.
    """
    options = PipelineOptions.of(options)
    configuration = run_settings(locals())
    seed = configuration["seed"]
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
        with_state_folder(options, output),
        trainer_options={"accelerator": accelerator, "logger": run_logger, **progress_options()},
        configuration=configuration,
        scheme=scheme,
    )
    run.export_for_target(output)
    write_run(run, run.record("resnet_cifar10", model, "top1", seed), output, run_logger)


if __name__ == "__main__":
    run_recipe(main)
