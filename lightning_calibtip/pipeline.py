"""Pipelines: which stages run, in which order, with which defaults; and running them on a finished model."""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader

from .calibration.calibration_set import FirstSamples, batch_size
from .callbacks.adaquant import AdaQuant
from .callbacks.batch_norm_tuning import BatchNormTuning
from .callbacks.bias_tuning import BiasTuning
from .callbacks.bit_allocation import BitAllocation
from .callbacks.calibration import Calibration
from .callbacks.stage import Stage
from .module import QuantizationModule
from .run import QuantizationRun, StageOutcome

log = logging.getLogger(__name__)

PRESETS: dict[str, Callable[..., AdaQuant]] = {"default": AdaQuant, "paper": AdaQuant.paper}
PIPELINES = ("calibrate", "light", "advanced", "sequential", "mixed")

# To find out how sensitive a layer is, its states at the candidate widths need not be perfect.
_CANDIDATE_ITERATIONS = 100


def make_stages(
    pipeline: str,
    compression: float | Sequence[float] | None = None,
    candidates: Sequence[int | Sequence[int]] = (4, 8),
    observer: str = "mse",
    adaquant: Mapping[str, Any] | None = None,
    preparation: Mapping[str, Any] | None = None,
    allocation: Mapping[str, Any] | None = None,
    bias_tuning: Mapping[str, Any] | None = None,
    activation_budget: int | str | None = None,
    scratch_folder: str | Path | None = None,
    state_folder: str | Path | None = None,
    seed: int = 0,
) -> list[Stage]:
    """Stages of a pipeline, in order.

    - ``"calibrate"``: ranges only.
    - ``"light"``: ranges, bit allocation, BatchNorm tuning: no gradients.
    - ``"advanced"``: parallel AdaQuant at every candidate width, bit allocation over the results, BatchNorm and bias
      tuning.
    - ``"sequential"``: BatchNorm tuning, sequential AdaQuant at the given widths, bias tuning.

    - ``"mixed"``: short parallel AdaQuant at every candidate width, bit allocation over the results, and then all of
      ``"sequential"`` from the float weights at the widths chosen. With ``allocation={"sensitivity": ...}`` the first
      part is left out.

    ``"light"``, ``"advanced"`` and ``"mixed"`` choose the widths of all layers but the first, the last and overridden
    ones themselves, among ``candidates``; ``weight_bits`` and ``activation_bits`` then do not matter.

    BatchNorm tuning measures the statistics of settled widths, so it comes after bit allocation. Before sequential
    AdaQuant it gives a better start. After it, it would only do harm: an output of least error has less variance than
    its target, and BatchNorm tuning would blow it up again. Bias tuning comes last, since it corrects what is left, end
    to end.

    Args:
        pipeline: One of the above.
        compression: See ``BitAllocation``.
        candidates: See ``BitAllocation``.
        observer: Ranges of activations and weights, see ``Calibration``.
        adaquant: Further arguments of ``AdaQuant``; ``{"preset": "paper"}`` starts from the paper's settings.
        preparation: Further arguments of the parallel ``AdaQuant`` that prepares the candidates of ``"mixed"``.
        allocation: Further arguments of ``BitAllocation``.
        bias_tuning: Further arguments of ``BiasTuning``.
        activation_budget: Bytes of captured activations that may lie in memory, see ``AdaQuant``.
        scratch_folder: Where the rest lies meanwhile, see ``AdaQuant``.
        state_folder: Where AdaQuant keeps finished units, so that a killed run can go on, see ``AdaQuant``.
        seed: Of everything random.

    Raises:
        ValueError: If ``pipeline`` is unknown or a setting is out of its range.
    """
    options = dict(adaquant or {})
    preset = options.pop("preset", "default")
    if preset not in PRESETS:
        raise ValueError(f"adaquant preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    make_adaquant = PRESETS[preset]
    if pipeline not in PIPELINES:
        raise ValueError(f"pipeline must be one of {', '.join(PIPELINES)}, got {pipeline!r}.")
    stages: list[Stage] = [Calibration(observer, observer)]
    storage: dict[str, Any] = {"activation_budget": activation_budget, "scratch_folder": scratch_folder}
    options = {"seed": seed, "state_folder": state_folder, **storage, **options}
    allocating: dict[str, Any] = {"compression": compression, "candidates": candidates, "state_folder": state_folder}
    allocating |= {**storage, **(allocation or {})}
    widths = allocating["candidates"]
    if pipeline == "mixed":
        if allocating.get("sensitivity") is None:
            folder = None if state_folder is None else Path(state_folder) / "candidates"
            preparing = {"iterations": _CANDIDATE_ITERATIONS, "state_folder": folder, "seed": seed, **storage}
            stages.append(
                AdaQuant(
                    "parallel", "layer", candidates=allocating["candidates"], **{**preparing, **(preparation or {})}
                )
            )
        stages.append(BitAllocation(**{"start_over": True, **allocating}))
    if pipeline in ("sequential", "mixed"):
        stages.append(BatchNormTuning(activation_budget=activation_budget, scratch_folder=scratch_folder))
        stages.append(make_adaquant(**{"mode": "sequential", **options}))
    if pipeline == "advanced":
        stages.append(make_adaquant(**{"mode": "parallel", "granularity": "layer", "candidates": widths, **options}))
    if pipeline in ("light", "advanced"):
        stages.append(BitAllocation(**allocating))
        stages.append(BatchNormTuning(activation_budget=activation_budget, scratch_folder=scratch_folder))
    if pipeline in ("advanced", "sequential", "mixed"):
        stages.append(BiasTuning(**{"seed": seed, **(bias_tuning or {})}))
    return stages


def _quiet_trainer(options: Mapping[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
    defaults = {
        "accelerator": "auto",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, "callbacks": callbacks, **options})


def run_stages(
    module: QuantizationModule,
    stages: Sequence[Stage],
    calibration: Iterable[Any],
    validation: Any = None,
    trainer_options: Mapping[str, Any] | None = None,
    configuration: Mapping[str, Any] | None = None,
) -> QuantizationRun:
    """Run stages one after the other, with the user's validation before and after each.

    Args:
        module: Not calibrated yet, or to be tuned further.
        stages: In order.
        calibration: Dataloader (or any iterable) of calibration batches; it is gone through once, and the batches are
            kept.
        validation: Dataloader(s) for ``validation_step``, or None to evaluate nothing.
        trainer_options: Further arguments of the ``Trainer`` (accelerator, precision, logger, callbacks, ...). Its
            loggers get the metrics after each stage, under ``<stage>/<metric>``.
        configuration: Settings to be kept with the run; its loggers get them as hyperparameters.
    """
    options = dict(trainer_options or {})
    callbacks = list(options.pop("callbacks", None) or [])
    loggers = _quiet_trainer(options, []).loggers
    options["logger"] = loggers or False
    for logger in loggers if configuration else ():
        logger.log_hyperparams(dict(configuration or {}))
    # Kept, so that every stage sees the same samples, also of a loader that shuffles; and the Trainer would take a list
    # for several dataloaders.
    batches: DataLoader[Any] = DataLoader(list(calibration), batch_size=None)  # type: ignore[arg-type]

    def validate() -> dict[str, float]:
        # The user's step may use self.logger; what it logs there belongs to no stage.
        trainer = _quiet_trainer({**options, "logger": DummyLogger()}, callbacks)
        logged = trainer.validate(module, validation, verbose=False)
        return {key: float(value) for results in logged for key, value in results.items()}

    def evaluate_meanwhile() -> dict[str, float]:
        """Validate while another Trainer is at work on the module, and give it back as it was."""
        trainer, device = module.trainer, module.device
        try:
            return validate()
        finally:
            module.trainer = trainer
            module.to(device)

    def evaluate(name: str, step: int) -> dict[str, float]:
        if validation is None:
            return {}
        metrics = validate()
        for logger in loggers:
            logger.log_metrics({f"{name}/{key}": value for key, value in metrics.items()}, step=step)
        log.info("%s: %s", name, metrics)
        return metrics

    done: list[StageOutcome] = []
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        float_metrics = evaluate("float", 0)
        for step, stage in enumerate(stages, start=1):
            stage_options = {**options, "num_sanity_val_steps": 0, "limit_val_batches": 0}
            if isinstance(stage, BitAllocation) and stage.evaluate is None and validation is not None:
                stage.evaluate = evaluate_meanwhile
            _quiet_trainer(stage_options, [*callbacks, stage]).fit(module, batches)
            before = sum(other.name == stage.name for other in stages[: step - 1])
            name = f"{stage.name} {before + 1}" if before else stage.name
            done.append(StageOutcome(name, stage.seconds, evaluate(name, step), stage.figures, stage.exhibits))
    for stage in stages:
        stage.clean_up()
    samples = sum(batch_size(batch) for batch in batches)
    return QuantizationRun(module, float_metrics, done, samples, dict(configuration or module.hparams))


# What the Trainer says of every calibration, where it is meant to be so.
_EXPECTED_WARNINGS = (
    ".*configure_optimizers.* returned `None`",
    ".*does not have many workers.*",
    ".*defined a `validation_step` but have no `val_dataloader`.*",
    ".*max_epochs. was not set.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*isinstance\(treespec, LeafSpec\)..*deprecated.*",
    ".*smaller than the logging interval.*",
)


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    validation: Any = None,
    pipeline: str = "sequential",
    calibration_samples: int | None = None,
    stage_options: Mapping[str, Any] | None = None,
    trainer_options: Mapping[str, Any] | None = None,
    configuration: Mapping[str, Any] | None = None,
    **module_options: Any,
) -> QuantizationRun:
    """Quantize a finished model in one call.

    Args:
        model: A trained ``LightningModule`` (or any ``nn.Module``, with ``validation_step=`` among the module options).
        calibration: Dataloader of calibration batches; labels are not used.
        validation: Dataloader(s) for the model's ``validation_step``, to evaluate before and after each stage.
        pipeline: ``"calibrate"``, ``"light"``, ``"advanced"``, ``"sequential"`` or ``"mixed"``; see ``make_stages``.
        calibration_samples: Use only the first batches of ``calibration`` that hold this many samples.
        stage_options: Further arguments of ``make_stages``.
        trainer_options: Further arguments of the ``Trainer``.
        configuration: Settings to be kept with the run, in the report and by loggers; if None, those given here.
        **module_options: Arguments of ``QuantizationModule``: ``weight_bits``, ``activation_bits``, ``overrides``, ...
    """
    if calibration_samples is not None:
        calibration = FirstSamples(calibration, calibration_samples)
    module = QuantizationModule(model, **module_options)
    stages = make_stages(pipeline, **(stage_options or {}))
    if configuration is None:
        configuration = {"pipeline": pipeline, **(stage_options or {}), **module.hparams}
    return run_stages(module, stages, calibration, validation, trainer_options, configuration)
