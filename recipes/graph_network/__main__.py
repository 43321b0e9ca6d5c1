"""Train graph networks and quantize them: ``python -m recipes.graph_network --help`` lists the options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_calibtip import PipelineOptions, QuantizationScheme, quantize
from lightning_calibtip.pipeline.presets import PipelineName
from recipes.command_line import run_recipe
from recipes.output import make_logger, progress_options, run_settings, set_up_logging, with_state_folder, write_run

from .data import DataName, Split, graph_loaders
from .model import train

# What runs where nothing else is given. No engine runs messages, so there is no target.
SCHEME = QuantizationScheme(weight_bits=4, activation_bits=4)
OPTIONS = PipelineOptions(seed=0)

_ALL = ("gcn", "gat", "gin")


def main(
    model: Literal["all", "gcn", "gat", "gin", "sage"] = "all",
    data: DataName = "digits",
    width: int = 16,
    depth: int = 2,
    epochs: int = 60,
    pipeline: PipelineName = "sequential",
    calibration_samples: int = 512,
    split: Split = "test",
    accelerator: str = "auto",
    logger: Literal["wandb", "csv", "none"] = "none",
    output: Path = Path("runs/graph_network"),
    scheme: QuantizationScheme = SCHEME,
    options: PipelineOptions | Mapping[str, Any] = OPTIONS,
) -> None:
    """Train graph networks, quantize them by a CalibTIP pipeline and write result.json and quantized.ckpt of each.

    A run that was killed and is started again with the same output folder is resumed.

    Args:
        model: Kind of the layers; all: GCN, GAT and GIN, each in a folder of its own below the output folder.
        data: Digits, one graph whose nodes are classified, or molecules, whose logP is predicted.
        width: Number of features between layers.
        depth: Number of layers of message passing.
        epochs: Epochs of training.
        pipeline: Which stages run.
        calibration_samples: Number of molecules to calibrate on; of digits, it is the training nodes of the one graph.
        split: Evaluate on the test data, or on training data that are not trained on (to choose settings).
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
    loaders = graph_loaders(data, split, seed)
    for name in _ALL if model == "all" else (model,):
        folder = output / name if model == "all" else output
        trained = train(name, loaders, epochs, seed, accelerator, width=width, depth=depth)
        pl.seed_everything(seed, verbose=False)
        run_logger = make_logger(logger, folder, "calibtip-graph-network")
        run = quantize(
            trained,
            loaders.train,
            loaders.validation,
            pipeline,
            with_state_folder(options, folder),
            calibration_samples,
            trainer_options={"accelerator": accelerator, "logger": run_logger, **progress_options()},
            configuration={**configuration, "model": name},
            scheme=scheme,
        )
        run.export_for_target(folder)
        write_run(run, run.record("graph_network", f"{name}, {data}", trained.metric_name, seed), folder, run_logger)


if __name__ == "__main__":
    run_recipe(main)
