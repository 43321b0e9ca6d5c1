"""CalibTIP: the whole pipeline as one callback of an ordinary training."""

from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from ..calibration.calibration_set import FirstSamples
from ..callbacks.progress import progress_options
from ..callbacks.stage import check_precision, check_strategy
from ..export.onnx_file import require_packages
from ..loaders import check_loader
from ..module import QuantizationModule
from ..network.network import check_overrides
from ..network.scheme import QuantizationScheme
from ..network.targets import DEFAULT_TARGET
from ..option_fields import argument_names, field_names, require_count, require_known
from ..report.loggers import log_items
from .datamodule import KnowsDataModule
from .distributed import same_processes
from .options import PipelineOptions
from .presets import make_stages
from .run import QuantizationRun, StageOutcome
from .runner import run_stages
from .trained_weights import BEST, LAST, check_ckpt_path, chosen_checkpoint, holding_weights
from .trainer_options import validation_limit

_FILENAME = "quantized"


class CalibTIP(pl.Callback):
    """Quantizes the model when ``fit`` ends, evaluates it before and after with its own ``validation_step``, and writes
    a checkpoint.

    The trained module itself is not changed. The quantized checkpoint lies beside the Trainer's own; the figures go to
    the Trainer's loggers as ``calibtip/<stage>/<metric>``. ``result`` holds the outcome, ``result.module`` the
    quantized module.

    Args:
        pipeline: ``"light"``, ``"advanced"``, ``"sequential"``, ``"mixed"`` or ``"calibrate"``; see ``make_stages``.
        options: Options of the stages, see ``PipelineOptions``, or a nested mapping of those that differ from the
            defaults: ``{"adaquant": {"iterations": 200}, "allocation": {"compression": 0.13}}``.
        calibration_samples: How many samples to calibrate on.
        calibration_dataloader: Where they come from. If None, from the method ``calibration_dataloader`` of the
            DataModule or the model, where there is one, else the first of the training data (better without
            augmentation).
        filename: Name of the checkpoint without the suffix; ``<filename>_report`` beside it is the folder with
            ``report.html``, ``result.json``, tables and pictures. Where there is one already it becomes
            ``<filename>-v1``, ``-v2``, ..., as with Lightning's own checkpoints.
        metric: Name of the validation metric that the report shows; the first one logged if None.
        ckpt_path: Which weights are quantized: ``"best"`` for those that the Trainer's ModelCheckpoint has found best,
            ``"last"`` for those that the model has when training ends, or the path of a checkpoint. None: the best
            where a ModelCheckpoint monitors a metric and no StochasticWeightAveraging averages weights at the end,
            else the last. The report says which.
        export: Name of a target, see ``QuantizationScheme``, that the model is quantized for and exported to as
            ``model.onnx`` beside the checkpoint (``<filename>.onnx`` where a filename is given); None for no export.
        **scheme: Fields of ``QuantizationScheme``: ``weight_bits=4``, ``edge_bits=None``, ``overrides={"head": None}``,
            ... Here ``target`` is ``"onnxruntime"`` by default, so that the checkpoint can be exported; ``target=None``
            allows what that engine cannot run: ranges per token, groups, asymmetric weights.

    Raises:
        ValueError: At construction, if a value is out of its range.
        TypeError: At construction, if an option does not exist.
        ModuleNotFoundError: At construction, if a package that exporting needs is missing.

    Example:
        >>> callback = CalibTIP("sequential", {"adaquant": {"iterations": 200}}, weight_bits=4, activation_bits=4)
        >>> callback.options.adaquant.iterations, callback.scheme.weight_bits
        (200, 4)
    """

    result: QuantizationRun
    checkpoint_path: Path
    report_folder: Path

    def __init__(
        self,
        pipeline: str = "sequential",
        options: PipelineOptions | Mapping[str, Any] | None = None,
        *,
        calibration_samples: int = 1024,
        calibration_dataloader: Iterable[Any] | None = None,
        filename: str = _FILENAME,
        metric: str | None = None,
        ckpt_path: str | Path | None = None,
        export: str | None = None,
        **scheme: Any,
    ) -> None:
        require_count(calibration_samples, "calibration_samples")
        self.calibration_samples = calibration_samples
        self.calibration_dataloader = calibration_dataloader
        self.filename, self.metric, self.ckpt_path = filename, metric, ckpt_path
        self.pipeline, self.options = pipeline, PipelineOptions.of(options)
        own = argument_names(CalibTIP.__init__)
        require_known(scheme, [*own, *field_names(QuantizationScheme)], type(self).__name__)
        if calibration_dataloader is not None:
            check_loader(calibration_dataloader, "calibration_dataloader")
        if export is not None:
            require_packages()
        if scheme.setdefault("target", export or DEFAULT_TARGET) != export and export is not None:
            raise ValueError(
                f"export={export!r} needs target={export!r}, got target={scheme['target']!r}: leave target out, or "
                "leave export out and call result.export_onnx() afterwards."
            )
        self.export = export
        self.scheme = QuantizationScheme(**scheme)
        # Bad settings must show now, not after hours of training.
        for stage in make_stages(self.pipeline, self.options):
            stage.check(self.scheme)

    def __getattr__(self, name: str) -> Any:
        if name in ("result", "checkpoint_path", "report_folder"):
            raise AttributeError(
                f"{type(self).__name__}.{name} is not there yet: it is set when fit has ended, but not after an "
                "interruption and not under fast_dev_run."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before training: refuse what could not be finished after it."""
        if stage != "fit":
            return
        if isinstance(pl_module, QuantizationModule):
            raise MisconfigurationException(
                "CalibTIP quantizes a float model when its training ends, got a QuantizationModule: give the Trainer "
                "your own module, or stages in place of CalibTIP."
            )
        check_precision("CalibTIP", trainer)
        check_strategy("CalibTIP", trainer)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if isinstance(other, CalibTIP) and other is not self]
        if any(other.filename == self.filename for other in others):
            raise MisconfigurationException(
                f"Two CalibTIP callbacks would write {self.filename}.ckpt: give each a filename of its own."
            )
        check_ckpt_path(trainer, self.ckpt_path)
        check_overrides(pl_module, self.scheme)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the first epoch: the data to calibrate on must be one loader."""
        self._calibration_loader(trainer, pl_module)

    def _calibration_loader(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Where calibration samples come from: what was given, the DataModule's or the model's
        ``calibration_dataloader``, or the training data.

        Raises:
            MisconfigurationException: If these are several loaders.
        """
        if self.calibration_dataloader is not None:
            return self.calibration_dataloader
        for source in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
            if (own := getattr(source, "calibration_dataloader", None)) is not None:
                return own()
        loader: Any = trainer.train_dataloader
        if isinstance(loader, Mapping | list | tuple):
            raise MisconfigurationException(
                "The training data are several loaders, and CalibTIP calibrates on one: pass calibration_dataloader=, "
                "or give your DataModule a method calibration_dataloader."
            )
        return loader

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training is over: run the pipeline on a copy of the trained module."""
        if trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            why = "fast_dev_run is on" if trainer.fast_dev_run else "the training was interrupted"  # type: ignore[attr-defined]
            rank_zero_info(f"CalibTIP quantizes nothing: {why}.")
            return
        loader = self._calibration_loader(trainer, pl_module)
        shown = progress_options(trainer)
        if (data := trainer.datamodule) is not None:  # type: ignore[attr-defined]
            shown["callbacks"] = [*shown.get("callbacks", []), KnowsDataModule(data)]
        chosen = chosen_checkpoint(trainer, self.ckpt_path)
        own = self.ckpt_path in (None, BEST, LAST)
        with holding_weights(pl_module, chosen, own) as weights:
            rank_zero_info(f"CalibTIP quantizes the weights {'of ' if chosen else ''}{weights}.")
            module = QuantizationModule(pl_module, self.scheme)
        module.take_batch_hooks(trainer.datamodule)  # type: ignore[attr-defined]
        device = trainer.strategy.root_device.type
        self.result = run_stages(
            module,
            make_stages(self.pipeline, self.options),
            FirstSamples(loader, self.calibration_samples),
            trainer.val_dataloaders,
            {
                "accelerator": {"cuda": "gpu"}.get(device, device),
                "precision": trainer.precision,
                **validation_limit(trainer),
                **same_processes(trainer),
                **shown,
            },
            {"pipeline": self.pipeline, "weights": weights, **self.options.to_dict(), **self.scheme.to_dict()},
        )
        stages = [StageOutcome("float", 0.0, self.result.float_metrics, {}), *self.result.stages]
        for logger in trainer.loggers:
            for stage_outcome in stages:
                values = {**stage_outcome.figures, **stage_outcome.metrics, "seconds": stage_outcome.seconds}
                figures = {f"calibtip/{stage_outcome.name}/{key}": value for key, value in values.items()}
                logger.log_metrics(figures, step=trainer.global_step)
        for stage_outcome in stages:
            log_items(trainer.loggers, f"calibtip/{stage_outcome.name}", stage_outcome.items, trainer.global_step)
        checkpoints = trainer.checkpoint_callback
        folder = getattr(checkpoints, "dirpath", None) or trainer.default_root_dir
        self.checkpoint_path = trainer.strategy.broadcast(_free_path(Path(folder), self.filename))
        self.result.save(self.checkpoint_path, clean_up=False)
        if self.export is not None:
            stem = self.checkpoint_path.stem
            stem = stem.replace(_FILENAME, "model", 1) if self.filename == _FILENAME else stem
            self.result.export_after(self.checkpoint_path.with_name(f"{stem}.onnx"))
        self.report_folder = self.checkpoint_path.with_name(f"{self.checkpoint_path.stem}_report")
        metric = self.result.metric_or_first(self.metric)
        record = self.result.record("CalibTIP", type(pl_module).__name__, metric, self.options.seed)
        self.result.write_report(self.report_folder, record)
        self.result.log(trainer.loggers, self.checkpoint_path, "calibtip/", trainer.global_step)
        self.result.clean_up()


def _free_path(folder: Path, filename: str) -> Path:
    """Path of a checkpoint that does not exist yet."""
    names = (filename if version == 0 else f"{filename}-v{version}" for version in count())
    return next(path for path in (folder / f"{name}.ckpt" for name in names) if not path.exists())
