"""CalibTIP: the whole pipeline as one callback of an ordinary training."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ..calibration.calibration_set import FirstSamples
from ..module import QuantizationModule
from ..pipeline import make_stages, run_stages
from ..quantization.attention import possible_products
from ..quantization.kinds import quantizable_layers
from ..quantization.scheme import QuantizationScheme
from ..run import QuantizationRun, StageOutcome
from .exhibits import log_exhibits
from .progress import progress_options
from .stage import check_precision


class CalibTIP(pl.Callback):
    """Quantizes the model when ``fit`` ends, evaluates it before and after with its own ``validation_step``, and writes
    a checkpoint.

    The trained module itself is not changed. The quantized checkpoint lies beside the Trainer's own; the figures go to
    the Trainer's loggers as ``calibtip/<stage>/<metric>``. ``result`` holds the outcome, ``result.module`` the
    quantized module.

    Args:
        pipeline: ``"light"``, ``"advanced"``, ``"sequential"``, ``"mixed"`` or ``"calibrate"``; see ``make_stages``.
        weight_bits: Width of weights, 2 to 16.
        activation_bits: Width of the layers' inputs, 2 to 16.
        edge_bits: Width of the first and last layer, or None.
        overrides: Width by layer name or pattern, see ``QuantizationModule``.
        symmetric: Whether weights are signed with a zero point of 0.
        per_channel: Whether weights have a scale for each output channel.
        activation_symmetric: The same as ``symmetric`` for the layers' inputs.
        per_token: Whether each token gets a range of its own when it comes, see ``QuantizationModule``.
        compression: Budget of ``"light"``, ``"advanced"`` and ``"mixed"``, see ``BitAllocation``.
        candidates: Their candidate widths.
        calibration_samples: How many samples to calibrate on.
        calibration_dataloader: Where they come from; the first of the training data if None (better without
            augmentation).
        stage_options: Further arguments of ``make_stages``.
        filename: Of the checkpoint, without the suffix; ``<filename>_report`` beside it is the folder with
            ``report.html``, ``result.json``, tables and pictures.
        metric: Name of the validation metric that the report shows; the first one logged if None.
        seed: Of everything random.

    Raises:
        ValueError: At construction, if a setting is out of its range.
    """

    result: QuantizationRun
    checkpoint_path: Path
    report_folder: Path

    def __init__(
        self,
        pipeline: str = "sequential",
        weight_bits: int = 8,
        activation_bits: int = 8,
        edge_bits: int | None = 8,
        overrides: Mapping[str, int | Sequence[int] | None] | None = None,
        symmetric: bool = False,
        per_channel: bool = True,
        activation_symmetric: bool = False,
        per_token: bool = False,
        compression: float | Sequence[float] | None = None,
        candidates: Sequence[int | Sequence[int]] = (4, 8),
        calibration_samples: int = 1024,
        calibration_dataloader: Iterable[Any] | None = None,
        stage_options: Mapping[str, Any] | None = None,
        filename: str = "quantized",
        metric: str | None = None,
        seed: int = 0,
    ) -> None:
        self.pipeline = pipeline
        self.module_options: dict[str, Any] = {
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "edge_bits": edge_bits,
            "overrides": overrides,
            "symmetric": symmetric,
            "per_channel": per_channel,
            "activation_symmetric": activation_symmetric,
            "per_token": per_token,
        }
        self.stage_options = {
            "compression": compression,
            "candidates": candidates,
            "seed": seed,
            **(stage_options or {}),
        }
        if calibration_samples < 1:
            raise ValueError(f"calibration_samples must be at least 1, got {calibration_samples}.")
        self.calibration_samples = calibration_samples
        self.calibration_dataloader = calibration_dataloader
        self.filename, self.metric = filename, metric
        # Bad settings must show now, not after hours of training.
        QuantizationScheme(**self.module_options)
        make_stages(pipeline, **self.stage_options)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before training: refuse what could not be finished after it."""
        if stage != "fit":
            return
        check_precision("CalibTIP", trainer)
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"CalibTIP runs on one process, got {trainer.world_size}: train without it, then call "
                "lightning_calibtip.quantize(model, calibration_dataloader) in one process."
            )
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if isinstance(other, CalibTIP) and other is not self]
        if any(other.filename == self.filename for other in others):
            raise MisconfigurationException(
                f"Two CalibTIP callbacks would write {self.filename}.ckpt: give each a filename of its own."
            )
        QuantizationScheme(**self.module_options).check_overrides(
            [*quantizable_layers(pl_module), *possible_products(pl_module)]
        )

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
        module = QuantizationModule(pl_module, **self.module_options)
        module.take_batch_hooks(trainer.datamodule)  # type: ignore[attr-defined]
        device = trainer.strategy.root_device.type
        self.result = run_stages(
            module,
            make_stages(self.pipeline, **self.stage_options),
            FirstSamples(loader, self.calibration_samples),
            trainer.val_dataloaders,
            {
                "accelerator": {"cuda": "gpu"}.get(device, device),
                "precision": trainer.precision,
                **progress_options(trainer),
            },
            {"pipeline": self.pipeline, **self.stage_options, **self.module_options},
        )
        stages = [StageOutcome("float", 0.0, self.result.float_metrics, {}), *self.result.stages]
        for logger in trainer.loggers:
            for stage_outcome in stages:
                values = {**stage_outcome.figures, **stage_outcome.metrics, "seconds": stage_outcome.seconds}
                figures = {f"calibtip/{stage_outcome.name}/{key}": value for key, value in values.items()}
                logger.log_metrics(figures, step=trainer.global_step)
        for stage_outcome in stages:
            log_exhibits(trainer.loggers, f"calibtip/{stage_outcome.name}", stage_outcome.exhibits, trainer.global_step)
        checkpoints = trainer.checkpoint_callback
        folder = getattr(checkpoints, "dirpath", None) or trainer.default_root_dir
        self.checkpoint_path = Path(folder) / f"{self.filename}.ckpt"
        self.result.save(self.checkpoint_path)
        self.report_folder = self.checkpoint_path.with_name(f"{self.filename}_report")
        metric = self.result.metric_or_first(self.metric)
        record = self.result.record("CalibTIP", type(pl_module).__name__, metric, self.stage_options["seed"])
        self.result.write_report(self.report_folder, record)
        self.result.log(trainer.loggers, self.checkpoint_path, "calibtip/", trainer.global_step)
