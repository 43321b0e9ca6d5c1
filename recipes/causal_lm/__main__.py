"""Quantize a causal language model: ``python -m recipes.causal_lm --help`` lists the options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_calibtip import PipelineOptions, QuantizationScheme, quantize
from lightning_calibtip.pipeline.presets import PipelineName
from recipes.command_line import run_recipe
from recipes.output import make_logger, progress_options, run_settings, set_up_logging, with_state_folder, write_run

from .data import TextData
from .model import LanguageModel, load_tokenizer

# What runs where nothing else is given: weights alone, in groups, which is how language models are deployed.
SCHEME = QuantizationScheme(weight_bits=4, activation_bits=None, edge_bits=8, group_size=32)
OPTIONS = PipelineOptions(seed=0)


def main(
    model: str = "HuggingFaceTB/SmolLM2-135M",
    train: str = "Salesforce/wikitext:wikitext-2-raw-v1",
    validation: str = "Salesforce/wikitext:wikitext-2-raw-v1",
    gguf_file: str | None = None,
    pipeline: PipelineName = "sequential",
    calibration_samples: int = 64,
    window: int = 512,
    evaluation_windows: int | None = None,
    split: Literal["validation", "train"] = "validation",
    batch_size: int = 4,
    accelerator: str = "auto",
    logger: Literal["wandb", "csv", "none"] = "none",
    output: Path = Path("runs/causal_lm"),
    scheme: QuantizationScheme = SCHEME,
    options: PipelineOptions | Mapping[str, Any] = OPTIONS,
) -> None:
    """Quantize a causal language model by a CalibTIP pipeline and write result.json and quantized.ckpt.

    A run that was killed and is started again with the same output folder is resumed.

    Args:
        model: Name on the hub, or folder, of a transformers network.
        train: Text to calibrate on: a text file, a SQuAD v1.1 JSON file (its contexts), or a dataset of the hub with
            its configuration after a colon.
        validation: The same for the text to evaluate on.
        gguf_file: Name of a GGUF file in the model's folder (needs the packages gguf and accelerate).
        pipeline: Which stages run.
        calibration_samples: Number of windows to calibrate on.
        window: Tokens of a window.
        evaluation_windows: Most windows to evaluate on; all if not given.
        split: Evaluate on the validation text, or on the windows of the training text that are not calibrated on (to
            choose settings).
        batch_size: Windows of a batch.
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
    text = TextData(
        load_tokenizer(model, gguf_file),
        train,
        validation,
        calibration_samples,
        window,
        evaluation_windows,
        split,
        batch_size,
    )
    text.setup()
    trained = LanguageModel(model, gguf_file)
    run_logger = make_logger(logger, output, "calibtip-causal-lm")
    run = quantize(
        trained,
        text.train_dataloader(),
        text.val_dataloader(),
        pipeline,
        with_state_folder(options, output),
        trainer_options={"accelerator": accelerator, "logger": run_logger, **progress_options()},
        configuration=configuration,
        scheme=scheme,
    )
    run.export_for_target(output)
    record = {**run.record("causal_lm", model, "perplexity", seed), "evaluation_windows": len(text.evaluation)}
    write_run(run, record, output, run_logger)


if __name__ == "__main__":
    run_recipe(main)
