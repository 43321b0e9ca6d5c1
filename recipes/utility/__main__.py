"""Quantize by what mistakes cost: ``python -m recipes.utility --help`` lists the options."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_calibtip import PipelineOptions, QuantizationScheme, Utility, quantize
from lightning_calibtip.pipeline.presets import PipelineName
from recipes.command_line import run_recipe
from recipes.output import make_logger, progress_options, run_settings, set_up_logging, with_state_folder, write_run

from .subjects import load_subject

# What runs where nothing else is given.
SCHEME = QuantizationScheme(weight_bits=3, activation_bits=None)
OPTIONS = PipelineOptions(seed=0)


def main(
    subject: Literal["cancer", "digits", "cifar10"] = "digits",
    data: str | None = None,
    pipeline: PipelineName = "sequential",
    split: Literal["test", "train"] = "test",
    accelerator: str = "auto",
    logger: Literal["wandb", "csv", "none"] = "none",
    output: Path = Path("runs/utility"),
    scheme: QuantizationScheme = SCHEME,
    options: PipelineOptions | Mapping[str, Any] = OPTIONS,
) -> None:
    """Train a small network (or load ResNet-20), quantize it by a CalibTIP pipeline so that its decisions cost little,
    and write result.json and quantized.ckpt.

    Args:
        subject: What is quantized: breast cancer or digits of scikit-learn, or ResNet-20 on CIFAR-10.
        data: For cifar10, a folder with train*.parquet, test*.parquet and resnet20.pt.
        pipeline: Which stages run.
        split: Evaluate on the test samples, or on training samples that are not calibrated on (to choose settings).
        accelerator: Accelerator of the Trainer: cpu, gpu, auto, ...
        logger: Where metrics go besides the output folder.
        output: Folder for the results.
        scheme: Bit-widths and number formats.
        options: Options of the stages, or a nested mapping of those that differ from the stages' own defaults; the
            utility is the subject's own matrix where none is given.
    """
    options = PipelineOptions.of(options)
    set_up_logging()
    found = load_subject(subject, options.seed or 0, split, data)
    if options.utility is None:
        options = replace(options, utility=Utility(found.matrix))
    configuration = run_settings({**locals(), "options": options})
    configuration.pop("found")
    run_logger = make_logger(logger, output, "calibtip-utility")
    run = quantize(
        found.model,
        found.calibration,
        found.evaluation,
        pipeline,
        with_state_folder(options, output),
        trainer_options={"accelerator": accelerator, "logger": run_logger, **progress_options()},
        configuration=configuration,
        scheme=scheme,
    )
    run.export_for_target(output)
    write_run(run, run.record("utility", subject, found.metric, configuration["seed"]), output, run_logger)
    print(run.stages[-1].outcome)


if __name__ == "__main__":
    run_recipe(main)
