"""CalibTIP: the whole pipeline as one callback of an ordinary training."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ..calibration.calibration_set import FirstSamples
from ..callbacks.progress import progress_options
from ..callbacks.stage import check_precision, check_strategy
from ..export.onnx_file import require_packages
from ..module import QuantizationModule
from ..network.network import check_overrides
from ..network.scheme import QuantizationScheme
from ..network.targets import DEFAULT_TARGET
from ..option_fields import check_names
from ..report.loggers import log_items
from .distributed import same_processes
from .options import PipelineOptions
from .presets import make_stages
from .run import QuantizationRun, StageOutcome
from .runner import run_stages

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
        calibration_dataloader: Where they come from; the first of the training data if None (better without
            augmentation).
        filename: Name of the checkpoint without the suffix; ``<filename>_report`` beside it is the folder with
            ``report.html``, ``result.json``, tables and pictures.
        metric: Name of the validation metric that the report shows; the first one logged if None.
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
        export: str | None = None,
        **scheme: Any,
    ) -> None:
        if calibration_samples < 1:
            raise ValueError(f"calibration_samples must be at least 1, got {calibration_samples}.")
        self.calibration_samples = calibration_samples
        self.calibration_dataloader = calibration_dataloader
        self.filename, self.metric = filename, metric
        self.pipeline, self.options = pipeline, PipelineOptions.of(options)
        check_names(QuantizationScheme, scheme, type(self).__name__)
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

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before training: refuse what could not be finished after it."""
        if stage != "fit":
            return
        check_precision("CalibTIP", trainer)
        check_strategy("CalibTIP", trainer)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if isinstance(other, CalibTIP) and other is not self]
        if any(other.filename == self.filename for other in others):
            raise MisconfigurationException(
                f"Two CalibTIP callbacks would write {self.filename}.ckpt: give each a filename of its own."
            )
        check_overrides(pl_module, self.scheme)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training is over: run the pipeline on a copy of the trained module."""
        if trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        loader: Any = self.calibration_dataloader
        if loader is None:
            loader = trainer.train_dataloader
        if isinstance(loader, Mapping):
            raise MisconfigurationException("The training data are several loaders: pass calibration_dataloader=.")
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
                **same_processes(trainer),
                **progress_options(trainer),
            },
            {"pipeline": self.pipeline, **self.options.to_dict(), **self.scheme.to_dict()},
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
        self.checkpoint_path = Path(folder) / f"{self.filename}.ckpt"
        self.result.save(self.checkpoint_path, clean_up=False)
        if self.export is not None:
            stem = "model" if self.filename == _FILENAME else self.filename
            self.result.export_after(self.checkpoint_path.with_name(f"{stem}.onnx"))
        self.report_folder = self.checkpoint_path.with_name(f"{self.filename}_report")
        metric = self.result.metric_or_first(self.metric)
        record = self.result.record("CalibTIP", type(pl_module).__name__, metric, self.options.seed)
        self.result.write_report(self.report_folder, record)
        self.result.log(trainer.loggers, self.checkpoint_path, "calibtip/", trainer.global_step)
        self.result.clean_up()
