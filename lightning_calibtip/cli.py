"""The command line: fit, validate and quantize the user's own LightningModule and DataModule from YAML."""

import logging
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from .calibration.calibration_set import FirstSamples
from .callbacks.progress import progress_options
from .callbacks.stage import Stage
from .export.checkpoint import is_quantized
from .module import QuantizationModule
from .pipeline import make_stages, run_stages
from .report.record import record_table
from .run import QuantizationRun


class QuantizationTrainer(pl.Trainer):
    """A Trainer that can also quantize, and validate what was quantized."""

    def quantize(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        metric: str | None = None,
        pipeline: str = "sequential",
        stages: list[Stage] | None = None,
        weight_bits: int = 8,
        activation_bits: int = 8,
        edge_bits: int | None = 8,
        overrides: dict[str, int | list[int] | None] | None = None,
        symmetric: bool = False,
        per_channel: bool = True,
        activation_symmetric: bool = False,
        per_token: bool = False,
        compression: float | list[float] | None = None,
        candidates: list[int | list[int]] | None = None,
        stage_options: dict[str, Any] | None = None,
        calibration_samples: int = 1024,
        seed: int = 0,
        output: Path = Path("quantized"),
    ) -> QuantizationRun:
        """Quantize a trained model, and write result.json, report.html and quantized.ckpt.

        The Trainer's callbacks, which are made for training, take no part; its accelerator, precision, loggers,
        progress bar and ``limit_val_batches`` do.

        Args:
            model: The LightningModule.
            datamodule: Its ``calibration_dataloader``, or else ``train_dataloader``, gives the calibration batches,
                ``val_dataloader`` those to evaluate on; the model's own if None.
            ckpt_path: Checkpoint with the trained weights; None if the model has them.
            metric: Name of the validation metric that the report shows; the first one logged if None.
            pipeline: ``calibrate``, ``light``, ``advanced``, ``sequential`` or ``mixed``, see ``make_stages``.
            stages: Stages by class path, in place of ``pipeline``.
            weight_bits: Width of weights, 2 to 16.
            activation_bits: Width of the layers' inputs, 2 to 16.
            edge_bits: Width of the first and last layer, or null.
            overrides: Widths of layers by name or pattern; null for float.
            symmetric: Whether weights are signed with a zero point of 0.
            per_channel: Whether weights have a scale for each output channel.
            activation_symmetric: The same as ``symmetric`` for the layers' inputs.
            per_token: Whether each token gets a range of its own when it comes.
            compression: Size budget of light, advanced and mixed.
            candidates: Widths that these choose from; 4 and 8 if not given.
            stage_options: Further arguments of ``make_stages``.
            calibration_samples: How many samples to calibrate on.
            seed: Of everything random.
            output: Folder for the results.

        Raises:
            ValueError: If a setting is out of its range, or there is no calibration data.
            RuntimeError: If ``stages`` do not begin with a Calibration.
        """
        output.mkdir(parents=True, exist_ok=True)
        if is_overridden("configure_model", model):
            model.configure_model()
        if ckpt_path is not None:
            load_weights(model, ckpt_path)
        wrapped = QuantizationModule(
            model,
            weight_bits,
            activation_bits,
            edge_bits,
            overrides,
            symmetric,
            per_channel,
            activation_symmetric,
            per_token,
        )
        options = {
            "compression": compression,
            "candidates": candidates or [4, 8],
            "seed": seed,
            **(stage_options or {}),
        }
        wrapped.take_batch_hooks(datamodule)
        if datamodule is not None:
            datamodule.trainer = self
        calibration, validation = _loaders(model, datamodule)
        names = [type(stage).__name__ for stage in stages or ()]
        configuration = {"pipeline": names or pipeline, "ckpt_path": ckpt_path, **options, **wrapped.hparams}
        run = run_stages(
            wrapped,
            make_stages(pipeline, **options) if stages is None else stages,
            FirstSamples(calibration, calibration_samples),
            validation,
            self._stage_options(),
            {**configuration, "calibration_samples": calibration_samples},
        )
        run.save(output / "quantized.ckpt")
        record = run.record("quantize", type(model).__name__, run.metric_or_first(metric), seed)
        run.write_report(output, record)
        run.log(self.loggers, output / "quantized.ckpt")
        wrapped.print_summary()
        print(f"\n{record_table(record)}\n\nwritten to {output}")
        return run

    def _stage_options(self) -> dict[str, Any]:
        """Options by which the stages' Trainers are as this one is."""
        device = self.strategy.root_device.type
        return {
            "accelerator": {"cuda": "gpu"}.get(device, device),
            "precision": self.precision,
            "logger": self.loggers or False,
            "limit_val_batches": self.limit_val_batches,
            **progress_options(self),
        }

    @override
    def validate(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: Any = None,
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Validate, a quantized checkpoint too: the model is then wrapped as it was when quantized."""
        if model is not None and isinstance(ckpt_path, str | Path) and is_quantized(ckpt_path):
            model = QuantizationModule(model)
        # Not known to all versions of Lightning.
        options = {} if weights_only is None else {"weights_only": weights_only}
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule, **options)


class QuantizationCLI(LightningCLI):
    """``fit``, ``validate`` and ``quantize``."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """The commands, and which of their arguments come from elsewhere."""
        data = {"model", "datamodule"}
        return {
            "fit": {*data, "train_dataloaders", "val_dataloaders"},
            "validate": {*data, "dataloaders"},
            "quantize": data,
        }

    @override
    def _parse_ckpt_path(self) -> None:
        """Take a model's arguments from its checkpoint; a quantized one holds widths instead."""
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if not path or not is_quantized(path):
            super()._parse_ckpt_path()


def load_weights(model: pl.LightningModule, path: str | Path) -> None:
    """Load the weights of a Lightning checkpoint into a model.

    Raises:
        ValueError: If it is no checkpoint of this model, is quantized already, or holds more than tensors and plain
            values.
    """
    if is_quantized(path):
        raise ValueError(f"{path} is quantized already; give the checkpoint of the float model.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects besides tensors (hyperparameters?), which are not loaded: save it with "
            "save_checkpoint(path, weights_only=True)."
        ) from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path} is no Lightning checkpoint: it has no state_dict.")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a checkpoint of {type(model).__name__}: {error}") from error


def _loaders(model: pl.LightningModule, datamodule: pl.LightningDataModule | None) -> tuple[Iterable[Any], Any]:
    """Calibration and validation data."""
    source: Any = datamodule or model
    source.prepare_data()
    source.setup("fit")
    if hasattr(source, "calibration_dataloader"):
        calibration = source.calibration_dataloader()
    elif is_overridden("train_dataloader", source):
        calibration = source.train_dataloader()
    else:
        raise ValueError(f"{type(source).__name__} has no train_dataloader to calibrate on: give --data a DataModule.")
    if isinstance(calibration, Mapping | Sequence):
        raise ValueError(
            f"The training data of {type(source).__name__} are several loaders: add a calibration_dataloader method."
        )
    return calibration, source.val_dataloader() if is_overridden("val_dataloader", source) else None


def main() -> None:
    """Run the command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    QuantizationCLI(trainer_class=QuantizationTrainer, save_config_callback=None)
