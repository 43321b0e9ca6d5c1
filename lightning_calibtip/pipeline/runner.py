"""Running stages on a finished model, with the user's validation before and after each."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from .. import ranks
from ..batches import batch_size
from ..calibration.calibration_set import FirstSamples
from ..calibration.shared_batches import batches_of_first
from ..callbacks.stage import Stage
from ..files.state_folder import holding
from ..loaders import check_loader
from ..module import QuantizationModule
from ..network.scheme import QuantizationScheme
from ..option_fields import argument_names, field_names, require_known
from ..quiet import quiet_trainers
from .distributed import distributed_options, is_first_process
from .observation import ValidationObserver, WorkObserver
from .options import PipelineOptions
from .presets import make_stages
from .run import QuantizationRun, StageOutcome

log = logging.getLogger(__name__)


def _quiet_trainer(options: Mapping[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
    defaults = {
        "accelerator": "auto",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if isinstance(strategy := options.get("strategy"), Strategy):
        # Each Trainer connects to a strategy of its own.
        options = {**options, "strategy": deepcopy(strategy)}
    return pl.Trainer(**{**defaults, "callbacks": callbacks, **options})


@contextmanager
def _isolated_rng() -> Iterator[None]:
    """``isolate_rng``, which restores nothing where something is raised."""
    raised: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


@quiet_trainers()
@_isolated_rng()
def run_stages(
    module: QuantizationModule,
    stages: Sequence[Stage],
    calibration: Iterable[Any],
    validation: Any = None,
    trainer_options: Mapping[str, Any] | None = None,
    configuration: Mapping[str, Any] | None = None,
    float_metrics: Mapping[str, float] | None = None,
) -> QuantizationRun:
    """Run stages one after the other, with the user's validation before and after each.

    The global states of random numbers (torch, CUDA, NumPy, Python) are left as they are found.

    Args:
        module: Not calibrated yet, or to be tuned further.
        stages: In order. A stage whose ``evaluate`` is None gets the user's validation, to evaluate the model while it
            works.
        calibration: Dataloader (or any iterable) of calibration batches; it is gone through once, and the batches are
            kept.
        validation: Dataloader(s) for ``validation_step``, or None to evaluate nothing.
        trainer_options: Further arguments of the ``Trainer`` (accelerator, precision, logger, callbacks, ...). Its
            loggers get the metrics after each stage, under ``<stage>/<metric>``.
        configuration: Settings to be kept with the run; its loggers get them as hyperparameters.
        float_metrics: What validation logged for the float model, if that is known; measured if None.

    Raises:
        ValueError: If a stage's options do not go with the module's scheme, or its state folder holds something else.
        TypeError: If the data give single samples instead of batches, or are several loaders.
        RuntimeError: If another process is at work in a stage's state folder.

    Example:
        >>> import torch
        >>> from lightning_calibtip.pipeline.presets import make_stages
        >>> module = QuantizationModule(nn.Sequential(nn.Linear(4, 4)), weight_bits=4)
        >>> batches, cpu = [torch.randn(8, 4)], {"accelerator": "cpu"}
        >>> run = run_stages(module, make_stages("calibrate"), batches, trainer_options=cpu)
        >>> [stage.name for stage in run.stages], run.calibration_samples
        (['Calibration'], 8)
    """
    check_loader(calibration, "calibration")
    if validation is not None:
        check_loader(validation, "validation", several=True)
        if isinstance(validation, list) and not any(isinstance(each, DataLoader) for each in validation):
            # The Trainer would take each batch for a loader.
            validation = DataLoader(validation, batch_size=None)  # type: ignore[arg-type]
    if trainer_options is not None and not isinstance(trainer_options, Mapping):
        raise TypeError(f"trainer_options must be a mapping of arguments of the Trainer, got {trainer_options!r}.")
    options = distributed_options(dict(trainer_options or {}))
    callbacks = list(options.pop("callbacks", None) or [])
    loggers = _quiet_trainer(options, []).loggers
    options["logger"] = loggers or False
    for logger in loggers if configuration else ():
        logger.log_hyperparams(dict(configuration or {}))
    # Kept, so that every stage sees the same samples, also of a loader that shuffles; and the Trainer would take a list
    # for several dataloaders.
    kept = list(calibration)
    if not kept and float_metrics is not None:
        raise ValueError("The calibration data are used up: give run_stages(run.module, stages, loader) a new loader.")
    batches: DataLoader[Any] = DataLoader(kept, batch_size=None)  # type: ignore[arg-type]

    observer, work = ValidationObserver(), WorkObserver()

    def validate(*observers: pl.Callback) -> dict[str, float]:
        # The user's step may use self.logger; what it logs there belongs to no stage.
        trainer = _quiet_trainer({**options, "logger": DummyLogger()}, [*callbacks, *observers])
        with ExitStack() as stack:
            for each in observers:
                if isinstance(each, ValidationObserver):
                    stack.enter_context(each.noting(module))
            logged = trainer.validate(module, validation, verbose=False)
        return {key: float(value) for results in logged for key, value in results.items()}

    def evaluate_meanwhile(*observers: pl.Callback) -> dict[str, float]:
        """Validate, along with callbacks, while another Trainer is at work on the module, and give it back as it
        was."""
        trainer, device = module.trainer, module.device
        try:
            # Ranks must not part by what is decided from it.
            return ranks.from_first(validate(*observers))
        finally:
            module.trainer = trainer
            module.to(device)

    def evaluate(name: str, step: int) -> dict[str, float]:
        if validation is None:
            return {}
        metrics = validate(observer) if step == 0 else validate()
        if not metrics:
            log.warning("validation_step has logged no metric, so there is none to show: call self.log in it.")
        for logger in loggers:
            logger.log_metrics({f"{name}/{key}": value for key, value in metrics.items()}, step=step)
        log.info("%s: %s", name, metrics)
        return metrics

    for stage in stages:
        stage.check(module.network.scheme)
    done: list[StageOutcome] = []
    with ExitStack() as stack:
        # Two runs in one folder must part before the first has worked for hours.
        for stage in stages if is_first_process() else ():
            stack.enter_context(holding(stage.state_folder))
        if float_metrics is None:
            float_metrics = _of_float_model(module, partial(evaluate, "float", 0))
        for step, stage in enumerate(stages, start=1):
            stage_options = {
                **options, "num_sanity_val_steps": 0, "limit_val_batches": 0, "use_distributed_sampler": False
            }  # fmt: skip
            checks = [_SameBatches(kept), _PlanChecks(stages), work] if step == 1 else []
            with _evaluating(stage, evaluate_meanwhile if validation is not None else None):
                _quiet_trainer(stage_options, [*callbacks, *checks, stage]).fit(module, batches)
            before = sum(other.name == stage.name for other in stages[: step - 1])
            name = f"{stage.name} {before + 1}" if before else stage.name
            metrics = evaluate(name, step)
            result = stage.result
            done.append(StageOutcome(name, stage.seconds, metrics, result.figures, result.items, result.outcome))
    samples = sum(batch_size(batch) for batch in batches)
    example = next(iter(batches), None)
    configuration = dict(configuration or module.hparams)
    further = partial(
        run_stages,
        module,
        calibration=calibration,
        validation=validation,
        trainer_options=trainer_options,
        float_metrics=float_metrics,
    )
    return QuantizationRun(
        module,
        dict(float_metrics),
        done,
        samples,
        configuration,
        example,
        list(stages),
        module.global_rank == 0,
        validation=observer.validation,
        work=work.work,
        run_further=further,
    )


@contextmanager
def _evaluating(stage: Stage, evaluate: Callable[..., dict[str, float]] | None) -> Iterator[None]:
    """Inside, a stage that has no function to evaluate the model, or to run a callback along, has this one."""
    own = stage.evaluate, stage.watch_validation
    stage.evaluate, stage.watch_validation = own[0] or evaluate, own[1] or evaluate
    try:
        yield
    finally:
        stage.evaluate, stage.watch_validation = own


def _of_float_model(module: QuantizationModule, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Metrics of the float model; of one that is quantized already without its float weights, as it is."""
    if module.network.calibrated and module.network.has_float_weights:
        with module.quantized(False):
            return evaluate()
    return evaluate()


class _SameBatches(pl.Callback):
    """Gives all ranks the same calibration batches: those of rank 0, where a loader has given each its own."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called once the processes know of each other."""
        with ranks.together(trainer.world_size > 1):
            self.batches[:] = batches_of_first(self.batches)


class _PlanChecks(pl.Callback):
    """Lets stages to come see, after the first batch of the first one, what they will work on."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each calibration batch."""
        assert isinstance(pl_module, QuantizationModule)
        for stage in self.stages if batch_idx == 0 else ():
            stage.check_plan(pl_module)


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    validation: Any = None,
    pipeline: str = "sequential",
    options: PipelineOptions | Mapping[str, Any] | None = None,
    calibration_samples: int | None = None,
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
        options: Options of the stages, see ``PipelineOptions``, or a nested mapping of those that differ from the
            defaults: ``{"adaquant": {"iterations": 200}}``.
        calibration_samples: Use only the first batches of ``calibration`` that hold this many samples.
        trainer_options: Further arguments of the ``Trainer``.
        configuration: Settings to be kept with the run, in the report and by loggers; if None, those given here.
        **module_options: Arguments of ``QuantizationModule``: ``scheme``, ``validation_step``, or fields of the scheme
            (``weight_bits``, ``activation_bits``, ``group_size``, ``overrides``, ...).

    Raises:
        ValueError: If a value is out of its range.
        TypeError: If an option does not exist.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [torch.randn(8, 4)]
        >>> run = quantize(model, batches, pipeline="calibrate", weight_bits=4, trainer_options={"accelerator": "cpu"})
        >>> run.module.network.calibrated
        True
    """
    require_known(module_options, [*_NAMES, *field_names(QuantizationScheme)], "quantize")
    options = PipelineOptions.of(options)
    check_loader(calibration, "calibration")
    if calibration_samples is not None:
        calibration = FirstSamples(calibration, calibration_samples)
    if isinstance(model, QuantizationModule) and not model.network.calibrated:
        # A subclass of the user's, with a calibration_step of its own.
        if module_options:
            raise TypeError(
                f"{next(iter(module_options))} is an option of the QuantizationModule that was given already."
            )
        module = model
    else:
        module = QuantizationModule(model, **module_options)
    if configuration is None:
        configuration = {"pipeline": pipeline, **options.to_dict(), **module.hparams}
    return run_stages(module, make_stages(pipeline, options), calibration, validation, trainer_options, configuration)


# Arguments of ``quantize``; the fields of the scheme come on top.
_NAMES = [*argument_names(quantize), *(n for n in argument_names(QuantizationModule.__init__) if n != "model")]
