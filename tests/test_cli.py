"""The command line, as a user calls it."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_calibtip import Calibration, CalibTIP, PipelineOptions, QuantizationModule, QuantizationScheme
from lightning_calibtip.cli import QuantizationCLI, QuantizationTrainer
from lightning_calibtip.pipeline.trained_weights import load_weights
from tests.cli_model import Blobs, Classifier

CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "tests.cli_model.Classifier", "init_args": {"width": 12}},
    "data": {"class_path": "tests.cli_model.Blobs"},
    "trainer": {
        "accelerator": "cpu",
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "max_epochs": 3,
    },
}


def run(arguments: list[str]) -> QuantizationCLI:
    return QuantizationCLI(trainer_class=QuantizationTrainer, save_config_callback=None, args=arguments)


@pytest.fixture
def config(tmp_path):
    def write(**changes) -> str:
        content = {**CONFIG, **changes}
        content["trainer"] = {**CONFIG["trainer"], "default_root_dir": str(tmp_path), **changes.get("trainer", {})}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def test_fit_with_the_callback_quantize_its_checkpoint_and_validate_what_came_of_it(config, tmp_path):
    callback = {
        "class_path": "lightning_calibtip.CalibTIP",
        "init_args": {
            "pipeline": "calibrate",
            "options": {"calibration": {"percentile": 99.9}},
            "weight_bits": 5,
            "calibration_samples": 32,
            "filename": "at_once",
        },
    }
    trained = run(["fit", f"--config={config(trainer={'callbacks': [callback], 'max_epochs': 3})}"])
    assert (tmp_path / "at_once.ckpt").exists() and (tmp_path / "at_once_report" / "report.html").exists()
    (callback,) = (c for c in trained.trainer.callbacks if isinstance(c, CalibTIP))
    assert callback.options.calibration.percentile == 99.9 and callback.scheme.weight_bits == 5
    trained.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    options = ["--pipeline=sequential", "--weight_bits=4", "--adaquant.iterations=5", "--bias_tuning.epochs=2"]
    arguments = [f"--ckpt_path={tmp_path / 'trained.ckpt'}", "--calibration_samples=48", f"--output={tmp_path / 'out'}"]
    run(["quantize", f"--config={config()}", *options, *arguments])
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    expected = float(trained.trainer.callback_metrics["accuracy"])
    assert record["metric"] == "accuracy" and record["float"] == pytest.approx(expected)
    assert record["calibration_samples"] == 48 and [s["name"] for s in record["stages"]][-1] == "BiasTuning"
    assert {layer["weight_bits"] for layer in record["layers"]} == {4, 8}
    validated = run(["validate", f"--config={config()}", f"--ckpt_path={tmp_path / 'out' / 'quantized.ckpt'}"])
    assert float(validated.trainer.callback_metrics["accuracy"]) == pytest.approx(record["quantized"])
    tested = run(["test", f"--config={config()}", f"--ckpt_path={tmp_path / 'out' / 'quantized.ckpt'}"])
    assert float(tested.trainer.callback_metrics["test_accuracy"]) == pytest.approx(record["quantized"])
    predicted = run(["predict", f"--config={config()}", f"--ckpt_path={tmp_path / 'out' / 'quantized.ckpt'}"])
    quantized = predicted.trainer.lightning_module
    assert isinstance(quantized, QuantizationModule)
    logits = torch.cat(predicted.trainer.predict_loop.predictions)
    with torch.no_grad():
        assert torch.equal(logits, quantized(predicted.datamodule.points.tensors[0]))


def test_export_writes_what_quantize_has_made(config, tmp_path, capsys):
    trained = run(["fit", f"--config={config()}"])
    trained.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    arguments = ["--pipeline=calibrate", f"--ckpt_path={tmp_path / 'trained.ckpt'}", "--calibration_samples=32"]
    run(["quantize", f"--config={config()}", *arguments, "--target=onnxruntime", f"--output={tmp_path / 'out'}"])
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["exports"][0]["path"] == "model.onnx" and (tmp_path / "out" / "model.onnx").exists()
    checkpoint = f"--ckpt_path={tmp_path / 'out' / 'quantized.ckpt'}"
    run(["export", f"--config={config()}", checkpoint, f"--output={tmp_path / 'again.onnx'}"])
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()
    assert "of decisions agree" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not a quantized checkpoint: quantize it first"):
        run(["export", f"--config={config()}", f"--ckpt_path={tmp_path / 'trained.ckpt'}"])
    with pytest.raises(ValueError, match="activations with zero points, unlike target='tensorrt'"):
        run(["export", f"--config={config()}", checkpoint, "--target=tensorrt", f"--output={tmp_path / 'rt.onnx'}"])
    assert not (tmp_path / "rt.onnx").exists()


def test_fast_dev_run_tries_everything_and_writes_nothing(config, tmp_path):
    trainer = {"fast_dev_run": 2}
    output = tmp_path / "out"
    cli = run(["quantize", f"--config={config(trainer=trainer)}", "--weight_bits=4", f"--output={output}"])
    assert not output.exists() and not list(tmp_path.glob("**/*.ckpt"))
    assert cli.trainer.limit_val_batches == 2


def test_diagnose_explains_a_quantized_checkpoint_and_mends_it(config, tmp_path, capsys):
    trained = run(["fit", f"--config={config()}"])
    trained.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    weights, few = f"--ckpt_path={tmp_path / 'trained.ckpt'}", ["--weight_bits=2", "--activation_bits=2"]
    run(["quantize", f"--config={config()}", "--pipeline=calibrate", weights, *few, f"--output={tmp_path / 'out'}"])
    diagnose = ["diagnose", f"--config={config()}", f"--ckpt_path={tmp_path / 'out' / 'quantized.ckpt'}"]
    with pytest.raises(ValueError, match="give --float_ckpt_path the checkpoint of the training"):
        run([*diagnose, f"--output={tmp_path / 'why'}"])
    given = [f"--float_ckpt_path={tmp_path / 'trained.ckpt'}", f"--output={tmp_path / 'why'}"]
    run([*diagnose, *given])
    printed = capsys.readouterr().out
    assert "gain of float weight" in printed and (tmp_path / "why" / "diagnosis.csv").exists()
    assert not (tmp_path / "why" / "quantized.ckpt").exists()
    # However the small network has lost: something is worth a remedy.
    run([*diagnose, *given, "--apply=true", "--max_degradation=0", "--metric=accuracy", "--mode=max"])
    record = json.loads((tmp_path / "why" / "result.json").read_text())
    before = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["quantized"] >= before["quantized"] and record["float"] == before["float"]
    if record["quantized"] > before["quantized"]:
        assert (tmp_path / "why" / "quantized.ckpt").exists() and "than the float model's" in capsys.readouterr().out
        with pytest.warns(UserWarning, match=r"quantized\.ckpt is of an earlier run"):
            run([*diagnose, *given])


def test_stages_are_given_by_class_path_and_bit_widths_from_yaml(config, tmp_path):
    path = Path(config())
    content = yaml.safe_load(path.read_text())
    content |= {
        "stages": [
            {"class_path": "lightning_calibtip.Calibration", "init_args": {"observer": "minmax"}},
            {"class_path": "lightning_calibtip.BiasTuning", "init_args": {"epochs": 1}},
        ],
        "overrides": {"net.2": [5, 6]},
        "edge_bits": None,
        "output": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(content))
    run(["quantize", f"--config={path}"])
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["Calibration", "BiasTuning"]
    assert [(layer["weight_bits"], layer["activation_bits"]) for layer in record["layers"]] == [(8, 8), (5, 6), (8, 8)]
    assert "pipeline" in (tmp_path / "out" / "report.html").read_text()


def test_options_of_a_pipeline_beside_stages_are_refused(config, tmp_path):
    path = Path(config())
    stages = [{"class_path": "lightning_calibtip.Calibration"}]
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "stages": stages}))
    with pytest.raises(ValueError, match="stages have options of their own"):
        run(["quantize", f"--config={path}", "--adaquant.iterations=7", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_every_option_of_quantize_is_in_its_help():
    command = [sys.executable, "-m", "lightning_calibtip", "quantize", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    options = {field.name: field for field in fields(PipelineOptions)}
    nested = [f"{name}.{field.name}" for name in options for field in fields_of(getattr(PipelineOptions(), name))]
    own = ("pipeline", "stages", "ckpt_path", "metric", "calibration_samples", "output")
    for name in (*own, *options, *nested, *(field.name for field in fields(QuantizationScheme))):
        assert f"--{name} " in text, name


def fields_of(value):
    return fields(value) if is_dataclass(value) else ()


def test_nested_options_come_from_yaml_and_words_and_null_means_float(config, tmp_path):
    path = Path(config())
    content = yaml.safe_load(path.read_text())
    content |= {"pipeline": "light", "allocation": {"candidates": [4, 8], "checks": 0}, "activation_bits": None}
    content |= {"edge_bits": None, "output": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump(content))
    run(["quantize", f"--config={path}", "--allocation.compression=0.2", "--batch_norm_tuning.reference=training"])
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == [
        "Calibration",
        "BitAllocation",
        "Equalization",
        "BatchNormTuning",
    ]
    assert {layer["activation_bits"] for layer in record["layers"]} == {None}
    assert {layer["weight_bits"] for layer in record["layers"]} <= {4, 8}
    assert record["stages"][1]["figures"]["compression"] <= 0.2


def test_a_wrong_option_or_value_is_said_before_anything_runs(config, capsys):
    with pytest.raises(SystemExit):
        run(["quantize", f"--config={config()}", "--adaquant.speed=5"])
    assert "adaquant.speed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="iterations must be an integer of at least 1, got 0"):
        run(["quantize", f"--config={config()}", "--adaquant.iterations=0"])


def test_bad_checkpoints_and_data_are_named(tmp_path):
    torch.save({"state_dict": {"other": torch.ones(1)}}, tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt is not a checkpoint of Classifier"):
        load_weights(Classifier(), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"list.ckpt is no Lightning checkpoint: it has no state_dict"):
        load_weights(Classifier(), tmp_path / "list.ckpt")
    trainer = QuantizationTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="Classifier has no train_dataloader to calibrate on"):
        trainer.quantize(Classifier(), output=tmp_path)

    class Several(Blobs):
        def train_dataloader(self):
            return [super().train_dataloader()] * 2

    with pytest.raises(ValueError, match="training data of Several are several loaders"):
        trainer.quantize(Classifier(), Several(), output=tmp_path)


def test_a_calibration_dataloader_of_its_own_is_preferred(tmp_path):
    class Own(Blobs):
        def calibration_dataloader(self):
            yield self.points.tensors[0][:10] * 100

    trainer = QuantizationTrainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    run = trainer.quantize(Classifier(), Own(), stages=[Calibration(observer="minmax")], output=tmp_path)
    assert run.calibration_samples == 10
    assert run.module.network.layers["net.0"].input_quantizers[0].step_size() * 255 > 100


def test_batches_go_through_the_datamodules_hooks_in_calibration_and_evaluation(tmp_path):
    class Scaled(Blobs):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert self.trainer is not None
            return batch[0] * 50, batch[1]

        def train_dataloader(self):
            assert self.trainer is not None
            return super().train_dataloader()

    torch.manual_seed(0)
    data, model = Scaled(), Classifier()
    trainer = QuantizationTrainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    run = trainer.quantize(model, data, stages=[Calibration(observer="minmax")], output=tmp_path)
    points = data.points.tensors[0] * 50
    reach = float(points.max() - points.min())
    assert run.module.network.layers["net.0"].input_quantizers[0].step_size() * 255 == pytest.approx(reach, rel=1e-3)
    (found,) = trainer.validate(model, ckpt_path=tmp_path / "quantized.ckpt", datamodule=data, verbose=False)
    assert found["accuracy"] == pytest.approx(run.metrics["accuracy"])


def test_stages_run_as_the_trainer_says(tmp_path, monkeypatch):
    seen = {}

    def watching(module, stages, calibration, validation, options, configuration):
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_calibtip.trainer.run_stages", watching)
    logger = CSVLogger(tmp_path)
    trainer = QuantizationTrainer(
        accelerator="cpu", precision="bf16-mixed", logger=logger, limit_val_batches=2, enable_progress_bar=False
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.quantize(Classifier(), Blobs(), output=tmp_path)
    assert seen["accelerator"] == "cpu" and seen["precision"] == "bf16-mixed" and seen["logger"] == [logger]
    assert seen["limit_val_batches"] == 2 and seen["enable_progress_bar"] is False


def test_a_wrong_metric_costs_no_run_and_a_quantized_checkpoint_is_refused(tmp_path, caplog):
    trainer = QuantizationTrainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.quantize(Classifier(), Blobs(), metric="acc", stages=[Calibration()], output=tmp_path)
    assert "validation logged no 'acc', only accuracy" in caplog.text
    assert json.loads((tmp_path / "result.json").read_text())["metric"] == "accuracy"
    with pytest.raises(ValueError, match="is quantized already"):
        load_weights(Classifier(), tmp_path / "quantized.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"path": Path("x")}}, tmp_path / "objects.ckpt")
    with pytest.raises(ValueError, match="holds Python objects besides tensors"):
        load_weights(Classifier(), tmp_path / "objects.ckpt")


def test_quantize_runs_in_as_many_processes_as_the_trainer_has(config, tmp_path):
    path = config(trainer={"devices": 2, "strategy": "ddp"})
    arguments = ["--pipeline=calibrate", "--calibration_samples=32", f"--output={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "lightning_calibtip", "quantize", f"--config={path}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    # One of them writes and prints.
    assert done.stdout.count(f"written to {tmp_path / 'out'}") == 1
    assert (tmp_path / "out" / "quantized.ckpt").exists()


def test_abbreviations_start_nothing(config, capsys):
    with pytest.raises(SystemExit):
        run(["quantize", f"--config={config()}", "--weight_bit=4"])
    assert "unrecognized arguments: --weight_bit=4" in capsys.readouterr().err
