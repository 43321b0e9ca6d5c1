"""A Trainer that can also quantize, diagnose and export: what the command line calls."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from .calibration.calibration_set import FirstSamples
from .callbacks.diagnosis import Diagnosis
from .callbacks.progress import progress_options
from .callbacks.stage import Stage
from .diagnosis.diagnose import DiagnosisResult
from .diagnosis.options import DiagnosisOptions
from .export.onnx_file import export_onnx, require_packages
from .export.report import ExportReport
from .lightning_types import overrides
from .module import QuantizationModule
from .network.checkpoint import is_quantized
from .network.scheme import QuantizationScheme
from .pipeline.distributed import same_processes
from .pipeline.options import PipelineOptions
from .pipeline.presets import PipelineName, make_stages
from .pipeline.run import QuantizationRun
from .pipeline.runner import run_stages
from .pipeline.trained_weights import load_weights
from .pipeline.trainer_options import validation_limit
from .report.loggers import log_checkpoint
from .report.record import record_table


class QuantizationTrainer(pl.Trainer):
    """A Trainer that can also quantize, and validate and export what was quantized. See ``QuantizationCLI``."""

    def quantize(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        metric: str | None = None,
        pipeline: PipelineName = "sequential",
        stages: list[Stage] | None = None,
        calibration_samples: int = 1024,
        output: Path = Path("quantized"),
        scheme: QuantizationScheme | None = None,
        options: PipelineOptions | Mapping[str, Any] | None = None,
    ) -> QuantizationRun:
        """Quantize a trained model, and write result.json, report.html, quantized.ckpt and, for a target, model.onnx.

        The Trainer's callbacks, which are made for training, take no part; its accelerator, precision, loggers,
        devices, progress bar and ``limit_val_batches`` do. Under ``fast_dev_run`` as many batches and optimiser steps
        are taken as it says, and nothing is written.

        Args:
            model: The LightningModule.
            datamodule: Its ``calibration_dataloader``, or else ``train_dataloader``, gives the calibration batches,
                ``val_dataloader`` those to evaluate on; the model's own if None.
            ckpt_path: Checkpoint with the trained weights; None if the model has them.
            metric: Name of the validation metric that the report shows; the first one logged if None.
            pipeline: ``calibrate``, ``light``, ``advanced``, ``sequential`` or ``mixed``, see ``make_stages``.
            stages: Stages by class path, in place of ``pipeline``.
            calibration_samples: How many samples to calibrate on.
            output: Folder for the results.
            scheme: Bit-widths and number formats; on the command line each of its fields is an argument.
            options: Options of the stages; on the command line each of them is an argument
                (``--adaquant.iterations``).

        Raises:
            ValueError: If a setting is out of its range, or there is no calibration data.
            RuntimeError: If ``stages`` do not begin with a Calibration.
        """
        options = PipelineOptions.of(options)
        if stages is not None and options.to_dict() != PipelineOptions().to_dict():
            raise ValueError(
                "stages have options of their own, so those of a pipeline (adaquant, calibration, seed, ...) would be "
                "ignored: give them in the stages' init_args, or take a pipeline instead of stages."
            )
        if stages is not None and pipeline != "sequential":
            raise ValueError(f"stages take the place of a pipeline: leave out --pipeline {pipeline}, or --stages.")
        if scheme is not None and scheme.target is not None:
            require_packages()
        trial_run = int(self.fast_dev_run)  # type: ignore[attr-defined]
        if trial_run:
            options = _shortened(options, trial_run)
        else:
            output.mkdir(parents=True, exist_ok=True)
        _make(model, ckpt_path)
        if ckpt_path is None:
            rank_zero_warn("There is no --ckpt_path: the weights are those that the model is made with.")
        wrapped = QuantizationModule(model, scheme)
        wrapped.take_batch_hooks(datamodule)
        if datamodule is not None:
            datamodule.trainer = self
        calibration, validation = _loaders(model, datamodule)
        names = [type(stage).__name__ for stage in stages or ()]
        configuration = {"pipeline": names or pipeline, "ckpt_path": ckpt_path, **options.to_dict(), **wrapped.hparams}
        run = run_stages(
            wrapped,
            make_stages(pipeline, options) if stages is None else stages,
            list(islice(calibration, trial_run)) if trial_run else FirstSamples(calibration, calibration_samples),
            validation,
            self._stage_options(),
            {**configuration, "calibration_samples": calibration_samples},
        )
        if trial_run:
            rank_zero_info(f"quantize has run on {trial_run} batches and written nothing: fast_dev_run is on.")
            run.clean_up()
            return run
        run.save(output / "quantized.ckpt", clean_up=False)
        run.export_for_target(output)
        record = run.record("quantize", type(model).__name__, run.metric_or_first(metric), options.seed)
        run.write_report(output, record)
        run.log(self.loggers, output / "quantized.ckpt")
        run.clean_up()
        if run.writes:
            wrapped.print_summary()
            print("\n".join(map(str, ["", record_table(record), "", *run.exports, f"written to {output}"])))
        return run

    def export(
        self,
        model: pl.LightningModule,
        ckpt_path: str,
        datamodule: pl.LightningDataModule | None = None,
        target: str | None = None,
        output: Path = Path("model.onnx"),
        int4: bool = False,
        check: bool = True,
    ) -> ExportReport:
        """Write a quantized checkpoint as an ONNX file, and check it in ONNX Runtime on a calibration batch.

        Args:
            model: The LightningModule.
            ckpt_path: Checkpoint that ``quantize`` or the CalibTIP callback has written.
            datamodule: Its ``calibration_dataloader``, or else ``train_dataloader``, gives the batch; the model's own
                if None.
            target: Name of a target, whose formats the checkpoint must have; that which it was quantized for if None.
            output: File to write.
            int4: Whether weights of at most 4 bits are stored in 4 bits, which is smaller, not faster.
            check: Whether the file is compared with the torch model.

        Raises:
            ValueError: If the checkpoint is not quantized, or the target cannot run its formats.
        """
        _require_quantized(ckpt_path, "export")
        _make(model, None)
        wrapped = QuantizationModule.load_from_checkpoint(ckpt_path, map_location="cpu", model=model)
        if datamodule is not None:
            datamodule.trainer = self
        wrapped.take_batch_hooks(datamodule)
        calibration, _ = _loaders(model, datamodule)
        batch = wrapped.on_after_batch_transfer(wrapped.on_before_batch_transfer(next(iter(calibration)), 0), 0)
        report = export_onnx(wrapped, output, batch, target, int4=int4, check=check)
        log_checkpoint(self.loggers, output)
        print(report)
        return report

    def diagnose(
        self,
        model: pl.LightningModule,
        ckpt_path: str,
        datamodule: pl.LightningDataModule | None = None,
        float_ckpt_path: str | None = None,
        calibration_samples: int = 1024,
        output: Path = Path("diagnosis"),
        options: DiagnosisOptions | None = None,
    ) -> DiagnosisResult:
        """Say what each layer of a quantized checkpoint costs, why, and what can be done; apply remedies if asked.

        Writes report.html and diagnosis.csv, and with ``--apply true`` the mended quantized.ckpt.

        Args:
            model: The LightningModule.
            ckpt_path: Checkpoint that ``quantize`` or the CalibTIP callback has written.
            datamodule: Its data, see ``quantize``; the model's own if None.
            float_ckpt_path: Checkpoint with the trained float weights; None if the model has them.
            calibration_samples: How many samples to look at.
            output: Folder for the results.
            options: Options of the diagnosis; on the command line each of its fields is an argument.

        Raises:
            ValueError: If the checkpoint is not quantized, or the float weights are missing.
        """
        _require_quantized(ckpt_path, "diagnose")
        output.mkdir(parents=True, exist_ok=True)
        _make(model, float_ckpt_path)
        wrapped = QuantizationModule.load_from_checkpoint(ckpt_path, map_location="cpu", model=model)
        if not wrapped.network.has_float_weights:
            raise ValueError(
                "A diagnosis compares with the float model, whose weights are not in a quantized checkpoint: give "
                "--float_ckpt_path the checkpoint of the training."
            )
        wrapped.take_batch_hooks(datamodule)
        if datamodule is not None:
            datamodule.trainer = self
        calibration, validation = _loaders(model, datamodule)
        stage, mended = Diagnosis(options), output / "quantized.ckpt"
        configuration = {"ckpt_path": ckpt_path, "float_ckpt_path": float_ckpt_path, **wrapped.hparams}
        samples = FirstSamples(calibration, calibration_samples)
        run = run_stages(wrapped, [stage], samples, validation, self._stage_options(), configuration)
        assert stage.diagnosis is not None
        if stage.diagnosis.applied:
            run.save(mended)
        elif mended.exists():
            rank_zero_warn(f"{mended} is of an earlier run: this one has applied no remedy.")
        metric = run.metric_or_first(stage.options.metric)
        run.write_report(output, run.record("diagnose", type(model).__name__, metric, None))
        if run.writes:
            print("\n".join([*(item.text for item in stage.items), stage.diagnosis.outcome, f"written to {output}"]))
        return stage.diagnosis

    def _stage_options(self) -> dict[str, Any]:
        """Options that make the Trainers of the stages like this one."""
        device = self.strategy.root_device
        return {
            "accelerator": {"cuda": "gpu"}.get(device.type, device.type),
            **({} if device.index is None else {"devices": [device.index]}),
            "precision": self.precision,
            "logger": self.loggers or False,
            **validation_limit(self),
            **same_processes(self),
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
        options = _if_known(weights_only)
        return super().validate(_wrapped(model, ckpt_path), dataloaders, ckpt_path, verbose, datamodule, **options)

    @override
    def test(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: Any = None,
        verbose: bool = True,
        datamodule: pl.LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Test, a quantized checkpoint too. See ``validate``."""
        options = _if_known(weights_only)
        return super().test(_wrapped(model, ckpt_path), dataloaders, ckpt_path, verbose, datamodule, **options)

    @override
    def predict(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Predict, with a quantized checkpoint too. See ``validate``."""
        options = _if_known(weights_only)
        wrapped = _wrapped(model, ckpt_path)
        return super().predict(wrapped, dataloaders, datamodule, return_predictions, ckpt_path, **options)


def _make(model: pl.LightningModule, ckpt_path: str | None) -> None:
    """Let a model make its layers, if it has not yet, and load its weights, if they are in a checkpoint."""
    if overrides(model, "configure_model"):
        model.configure_model()
    if ckpt_path is not None:
        load_weights(model, ckpt_path)


def _require_quantized(ckpt_path: str, command: str) -> None:
    """Refuse a checkpoint that is not quantized.

    Raises:
        ValueError: If it is not.
    """
    if not is_quantized(ckpt_path):
        raise ValueError(
            f"{ckpt_path} is not a quantized checkpoint: quantize it first, and {command} what that writes."
        )


def _wrapped(model: pl.LightningModule | None, ckpt_path: Any) -> pl.LightningModule | None:
    """The model as a checkpoint wants it."""
    if model is not None and isinstance(ckpt_path, str | Path) and is_quantized(ckpt_path):
        return QuantizationModule(model)
    return model


def _shortened(options: PipelineOptions, steps: int) -> PipelineOptions:
    """The options, with a few steps of the optimisers."""
    return replace(
        options,
        adaquant=replace(options.adaquant, iterations=min(steps, options.adaquant.iterations)),
        preparation=replace(options.preparation, iterations=min(steps, options.preparation.iterations)),
        bias_tuning=replace(options.bias_tuning, epochs=1),
    )


def _if_known(weights_only: bool | None) -> dict[str, Any]:
    """An argument that not all versions of Lightning know, if it is given."""
    return {} if weights_only is None else {"weights_only": weights_only}


def _loaders(model: pl.LightningModule, datamodule: pl.LightningDataModule | None) -> tuple[Iterable[Any], Any]:
    """Calibration and validation data."""
    source: Any = datamodule or model
    source.prepare_data()
    source.setup("fit")
    if hasattr(source, "calibration_dataloader"):
        calibration = source.calibration_dataloader()
    elif overrides(source, "train_dataloader"):
        calibration = source.train_dataloader()
    else:
        raise ValueError(f"{type(source).__name__} has no train_dataloader to calibrate on: give --data a DataModule.")
    if isinstance(calibration, Mapping | Sequence):
        raise ValueError(
            f"The training data of {type(source).__name__} are several loaders: add a calibration_dataloader method."
        )
    return calibration, source.val_dataloader() if overrides(source, "val_dataloader") else None
