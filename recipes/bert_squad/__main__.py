"""Quantize a question answering network: ``python -m recipes.bert_squad --help`` lists the options."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_calibtip import PipelineOptions, QuantizationScheme, quantize
from lightning_calibtip.pipeline.presets import PipelineName
from lightning_calibtip.pipeline.run import QuantizationRun
from recipes.command_line import run_recipe
from recipes.output import make_logger, progress_options, run_settings, set_up_logging, with_state_folder, write_run

from .data import SquadData
from .model import QuestionAnswering
from .windows import WindowMaker, check_fit, check_vocabulary, load_tokenizer, takes_token_types

log = logging.getLogger(__name__)

FINE_TUNING_EPOCHS = 2

# What runs where nothing else is given.
SCHEME = QuantizationScheme(weight_bits=4, activation_bits=8, target="onnxruntime")
OPTIONS = PipelineOptions(seed=0)


def main(
    model: str = "csarron/bert-base-uncased-squad-v1",
    train: str = "squad",
    validation: str = "squad",
    tokenizer: str | None = None,
    pipeline: PipelineName = "sequential",
    calibration_samples: int = 256,
    split: Literal["validation", "train"] = "validation",
    max_length: int = 384,
    doc_stride: int = 128,
    accelerator: str = "auto",
    logger: Literal["wandb", "csv", "none"] = "none",
    output: Path = Path("runs/bert_squad"),
    scheme: QuantizationScheme = SCHEME,
    options: PipelineOptions | Mapping[str, Any] = OPTIONS,
) -> None:
    """Quantize a question answering network by a CalibTIP pipeline and write result.json and quantized.ckpt.

    A checkpoint without a question answering head is fine-tuned on the training questions first, and written to
    the folder fine_tuned. A run that was killed and is started again with the same output folder (and, after
    fine-tuning, with fine_tuned as its model) is resumed.

    Args:
        model: Name on the hub, or folder, of a transformers network.
        train: Training questions: a dataset of the hub, or a SQuAD v1.1 JSON file.
        validation: The same for the questions to evaluate on.
        tokenizer: Name on the hub, or folder, if it is not where the model is.
        pipeline: Which stages run.
        calibration_samples: Number of windows to calibrate on, each of another training question.
        split: Evaluate on the validation questions, or on the training questions that are not calibrated on (to choose
            settings).
        max_length: Most tokens of a window: question, part of the context and special tokens.
        doc_stride: Number of context tokens that a window shares with the next one.
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
    reader = load_tokenizer(tokenizer or model)
    trained = QuestionAnswering(model)
    check_fit(reader, trained.net, max_length)
    maker = WindowMaker(reader, max_length, doc_stride, takes_token_types(reader, trained.net))
    questions = SquadData(maker, train, validation, calibration_samples, split, seed)
    questions.setup()
    check_vocabulary(questions.calibration, reader)
    trained.evaluation = questions.evaluation
    if not trained.has_trained_head:
        log.warning("%s has no trained question answering head: it is fine-tuned on %s first.", model, train)
        fine_tune(trained, questions, accelerator, output / "fine_tuned")
    run_logger = make_logger(logger, output, "calibtip-bert-squad")
    run = quantize(
        trained,
        questions.train_dataloader(),
        questions.val_dataloader(),
        pipeline,
        with_state_folder(options, output),
        trainer_options={"accelerator": accelerator, "logger": run_logger, **progress_options()},
        configuration=configuration,
        scheme=scheme,
    )
    run.export_for_target(output)
    record = {
        **run.record("bert_squad", model, "f1", seed),
        "exact_match": exact_match(run),
        "questions": len(questions.evaluation.questions),
        "skipped": questions.skipped,
    }
    write_run(run, record, output, run_logger)


def fine_tune(trained: QuestionAnswering, questions: SquadData, accelerator: str, folder: Path) -> None:
    """Train all of the network on the training questions, and write it to a folder that can be given as ``--model``."""
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=FINE_TUNING_EPOCHS,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        # Scored afterwards, like every float model.
        limit_val_batches=0,
    )
    # transformers loads in eval mode, and Lightning leaves it so: there would be no dropout.
    trained.train()
    trainer.fit(trained, questions.fine_tuning_dataloader())
    trained.cpu().eval()
    trained.save(folder, questions.tokenizer)
    log.warning("The fine-tuned network is in %s; give it as --model to use it again.", folder)


def exact_match(run: QuantizationRun) -> dict[str, float | None]:
    """The second score, before quantization, after calibration and in the end."""
    calibrated = next((stage.metrics for stage in run.stages if stage.name == "Calibration"), {})
    return {
        "float": run.float_metrics["exact_match"],
        "calibrated": calibrated.get("exact_match"),
        "quantized": run.metrics["exact_match"],
    }


if __name__ == "__main__":
    run_recipe(main)
