import json
import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_calibtip import CalibTIP, QuantizationModule
from lightning_calibtip.export.engine import make_session, run_session
from tests.conftest import TinyClassifier

QUICK = {"adaquant": {"iterations": 3}, "bias_tuning": {"epochs": 1}, "allocation": {"compression": 0.2}}


@pytest.mark.parametrize("pipeline", ["calibrate", "light", "advanced", "sequential"])
def test_pipeline_runs_when_training_ends(pipeline, tiny_classifier, images, loader, make_trainer, tmp_path):
    callback = CalibTIP(pipeline, QUICK, calibration_samples=32, weight_bits=4, activation_bits=4)
    logger = CSVLogger(tmp_path, name="log", version=0)
    trainer = make_trainer(callback, max_epochs=1, logger=logger)
    trainer.fit(tiny_classifier, loader, loader)
    result = callback.result
    assert result.calibration_samples == 32
    assert set(result.float_metrics) == set(result.metrics) == {"val_loss", "val_acc", "epoch_ends"}
    float_loss = trainer.validate(tiny_classifier, loader, verbose=False)[0]["val_loss"]
    assert result.float_metrics["val_loss"] == pytest.approx(float_loss, rel=1e-4)
    loaded = QuantizationModule.load_from_checkpoint(callback.checkpoint_path, model=TinyClassifier())
    with torch.no_grad():
        assert torch.equal(loaded(images), result.module(images))
    columns = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "calibtip/Calibration/val_acc" in columns and "calibtip/float/val_loss" in columns
    assert type(tiny_classifier.net.stem) is torch.nn.Conv2d


def test_checkpoint_lies_beside_the_trainers_own(tiny_classifier, loader, make_trainer, tmp_path):
    own = ModelCheckpoint(tmp_path / "ckpt")
    callback = CalibTIP("calibrate", filename="int8")
    make_trainer(callback, own, max_epochs=1, enable_checkpointing=True).fit(tiny_classifier, loader)
    names = {path.name for path in (tmp_path / "ckpt").iterdir()}
    assert {"int8.ckpt", "int8_report"} <= names and len(names) == 3
    report = (tmp_path / "ckpt" / "int8_report" / "report.html").read_text()
    assert callback.report_folder.name == "int8_report" and "net.blocks.0.conv1" in report
    record = json.loads((callback.report_folder / "result.json").read_text())
    assert record["metric"] == "no metric" and record["quantized"] is None, "there are no validation data"


def test_the_report_shows_the_metric_asked_for(tiny_classifier, loader, make_trainer):
    callback = CalibTIP("calibrate", calibration_samples=16, metric="val_acc")
    make_trainer(callback, max_epochs=1).fit(tiny_classifier, loader, loader)
    record = json.loads((callback.report_folder / "result.json").read_text())
    assert record["metric"] == "val_acc" and record["quantized"] == callback.result.metrics["val_acc"]


def test_the_model_is_exported_beside_the_checkpoint(tiny_classifier, loader, images, make_trainer):
    callback = CalibTIP("calibrate", calibration_samples=16, export="onnxruntime")
    make_trainer(callback, max_epochs=1).fit(tiny_classifier, loader, loader)
    session = make_session(callback.checkpoint_path.with_name("model.onnx"))
    (logits,) = run_session(session, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        wanted = callback.result.module(images)
    # Sums that are rounded to the other side of a step of 8 bits, and what follows from them.
    assert (torch.from_numpy(logits) - wanted).abs().max() < 6 / 255 * wanted.abs().max()
    record = json.loads((callback.report_folder / "result.json").read_text())
    assert record["exports"][0]["counts"]["QLinearAdd"] == 2 and record["exports"][0]["path"] == "model.onnx"
    page = (callback.report_folder / "report.html").read_text()
    assert "QLinearConv" in page and "of decisions agree with torch" in page


def test_what_can_be_deployed_is_the_default():
    assert CalibTIP().scheme.target == "onnxruntime" and CalibTIP(target=None).scheme.target is None
    with pytest.raises(ValueError, match=r"group_size=32: target='onnxruntime' .* or give target=None"):
        CalibTIP(activation_bits=None, group_size=32)
    assert CalibTIP(activation_bits=None, group_size=32, target=None).scheme.group_size == 32


def test_an_export_names_the_target(tiny_classifier, loader, make_trainer):
    assert CalibTIP(export="openvino").scheme.target == "openvino"
    with pytest.raises(ValueError, match="export='openvino' needs target='openvino', got target='onnxruntime'"):
        CalibTIP(export="openvino", target="onnxruntime")
    callback = CalibTIP("calibrate", filename="int8", export="onnxruntime", calibration_samples=16)
    make_trainer(callback, max_epochs=1).fit(tiny_classifier, loader)
    assert callback.checkpoint_path.with_name("int8.onnx").exists()


def test_an_export_that_fails_loses_nothing_of_the_run(tiny_classifier, loader, make_trainer, monkeypatch, caplog):
    def fail(*args, **options):
        raise ValueError("no such operator")

    monkeypatch.setattr("lightning_calibtip.pipeline.run.export_onnx", fail)
    callback = CalibTIP("calibrate", export="onnxruntime", calibration_samples=16)
    make_trainer(callback, max_epochs=1).fit(tiny_classifier, loader, loader)
    assert callback.checkpoint_path.exists() and (callback.report_folder / "report.html").exists()
    assert "model.onnx was not written (ValueError: no such operator). The checkpoint was" in caplog.text
    assert not callback.checkpoint_path.with_name("model.onnx").exists()


def test_own_calibration_data_are_used(tiny_classifier, loader, images, make_trainer):
    observer = {"calibration": {"observer": "minmax"}}
    callback = CalibTIP("calibrate", observer, calibration_dataloader=[images[:10] * 100])
    make_trainer(callback, max_epochs=1).fit(tiny_classifier, loader)
    quantizer = callback.result.module.network.layers["net.stem"].input_quantizers[0]
    assert quantizer.step_size() * 255 == pytest.approx(100 * float(images[:10].max() - images[:10].min()), rel=1e-3)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"pipeline": "fast"}, "pipeline must be one of calibrate, light, advanced, sequential, mixed, got 'fast'"),
        ({"weight_bits": 1}, "weight_bits must be"),
        ({"calibration_samples": 0}, "calibration_samples must be an integer of at least 1"),
        ({"pipeline": "light", "options": {"allocation": {"compression": 2.0}}}, "compression must be"),
        ({"pipeline": "light", "options": {"allocation": {"compression": 0.1}}}, "0.1 is out of reach: .* at 4 bits"),
        (
            {"pipeline": "light", "options": {"allocation": {"compression": [0.2, 0.05]}}, "overrides": {"a": 2}},
            "0.05 is out of reach: .* at 2 bits",
        ),
        ({"options": {"adaquant": {"iterations": 0}}}, r"options\.adaquant: iterations must be"),
        ({"weight_bits": None, "activation_bits": None}, "nothing would be quantized"),
        (
            {"pipeline": "light", "options": {"allocation": {"candidates": [4, 16]}}},
            "candidates: W16A16: target='onnxruntime' does not run weights at 16 bits; .* or target=None",
        ),
    ],
)
def test_bad_settings_raise_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        CalibTIP(**options)


def test_unknown_settings_raise_before_training():
    with pytest.raises(TypeError, match="CalibTIP: unknown option 'weight_bit'; did you mean 'weight_bits'"):
        CalibTIP(weight_bit=4)
    with pytest.raises(TypeError, match="CalibTIP: unknown option 'compression'"):
        CalibTIP("light", compression=0.13)
    with pytest.raises(TypeError, match=r"options\.adaquant: unknown option 'iteration'"):
        CalibTIP(options={"adaquant": {"iteration": 3}})


def test_datamodules_transfer_hooks_are_applied(images, make_trainer):
    class Scaled(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(images, torch.arange(len(images)) % 4), 16)

        val_dataloader = train_dataloader

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 100, batch[1]]

    callback = CalibTIP("calibrate", {"calibration": {"observer": "minmax"}})
    trainer = make_trainer(callback, max_epochs=1)
    data = Scaled()
    trainer.fit(TinyClassifier(), datamodule=data)
    quantizer = callback.result.module.network.layers["net.stem"].input_quantizers[0]
    assert quantizer.step_size() * 255 == pytest.approx(100 * float(images.max() - images.min()), rel=1e-3)


def test_override_that_matches_nothing_and_equal_filenames_are_refused_before_training(
    tiny_classifier, loader, make_trainer
):
    with pytest.raises(ValueError, match=r"overrides\['hed'\] matches no quantizable layer"):
        make_trainer(CalibTIP(overrides={"hed": 8})).fit(tiny_classifier, loader)
    with pytest.raises(MisconfigurationException, match=r"would write quantized\.ckpt"):
        make_trainer(CalibTIP(), CalibTIP(weight_bits=4)).fit(tiny_classifier, loader)


def test_fast_dev_run_quantizes_nothing(tiny_classifier, loader, make_trainer, caplog):
    callback = CalibTIP("calibrate")
    with caplog.at_level(logging.INFO):
        make_trainer(callback, fast_dev_run=True).fit(tiny_classifier, loader)
    assert "CalibTIP quantizes nothing: fast_dev_run is on." in caplog.text
    for name in ("result", "checkpoint_path", "report_folder"):
        assert not hasattr(callback, name)
        with pytest.raises(AttributeError, match=rf"CalibTIP\.{name} is not there yet"):
            getattr(callback, name)


class Moving(TinyClassifier):
    """Its weights say how many epochs it has seen, and the first epoch is the best."""

    def on_train_epoch_start(self):
        with torch.no_grad():
            self.net.head.bias.fill_(float(self.current_epoch + 1))

    def on_validation_epoch_end(self):
        self.log("worse_and_worse", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def quantized_bias(make_trainer, loader, tmp_path, callbacks=(), **options):
    module = Moving()
    callback = CalibTIP("calibrate", calibration_samples=16, weight_bits=8, activation_bits=8, **options)
    best = ModelCheckpoint(tmp_path / "ckpt", monitor="worse_and_worse", save_last=True)
    trainer = make_trainer(callback, best, *callbacks, max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, loader, loader)
    # The trained module has its own weights again.
    assert float(module.net.head.bias[0]) == 3
    html = (callback.report_folder / "report.html").read_text()
    return float(callback.result.module.network.layers["net.head"].float_bias[0]), html


def test_best_and_last_weights_are_quantized_as_asked(make_trainer, loader, tmp_path):
    bias, html = quantized_bias(make_trainer, loader, tmp_path / "default")
    assert bias == 1 and "epoch=0" in html and "(epoch 0, step" in html
    assert quantized_bias(make_trainer, loader, tmp_path / "best", ckpt_path="best")[0] == 1
    bias, html = quantized_bias(make_trainer, loader, tmp_path / "last", ckpt_path="last")
    assert bias == 3 and "as they are when training ends" in html
    other = Moving()
    torch.nn.init.constant_(other.net.head.bias, 7.0)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.ckpt")
    bias, html = quantized_bias(make_trainer, loader, tmp_path / "path", ckpt_path=tmp_path / "other.ckpt")
    assert bias == 7 and "other.ckpt" in html


def test_weights_that_are_averaged_at_the_end_are_quantized(make_trainer, loader, tmp_path):
    averaging = StochasticWeightAveraging(swa_lrs=1e-9, swa_epoch_start=1)
    module = Moving()
    callback = CalibTIP("calibrate", calibration_samples=16)
    best = ModelCheckpoint(tmp_path, monitor="worse_and_worse")
    make_trainer(callback, best, averaging, max_epochs=3, enable_checkpointing=True).fit(module, loader, loader)
    quantized = callback.result.module.network.layers["net.head"].float_bias[0]
    assert float(quantized) == float(module.net.head.bias[0]) > 1


def test_exponential_moving_averages_are_quantized(make_trainer, loader, tmp_path):
    averaging = pytest.importorskip("lightning.pytorch.callbacks", reason="needs lightning")
    if not hasattr(averaging, "EMAWeightAveraging"):
        pytest.skip("This release of Lightning has no EMAWeightAveraging.")
    # After each of three epochs the bias is one more; the mean of what it was is what is left in the model.
    for name, options in {"default": {}, "last": {"ckpt_path": "last"}}.items():
        callback = CalibTIP("calibrate", calibration_samples=16, **options)
        averages = averaging.EMAWeightAveraging(decay=0.5, update_starting_at_step=0)
        model = Moving()
        trainer = make_trainer(callback, averages, default_root_dir=tmp_path / name, max_epochs=3)
        trainer.fit(model, loader, loader)
        bias = float(callback.result.module.network.layers["net.head"].float_bias[0])
        assert bias == float(model.net.head.bias[0]) and 0 < bias < 3


def test_where_no_best_weights_were_kept_the_last_are_quantized(make_trainer, loader, tmp_path):
    callback = CalibTIP("calibrate", calibration_samples=16)
    keeps_nothing = ModelCheckpoint(tmp_path, monitor="worse_and_worse", save_top_k=0)
    make_trainer(callback, keeps_nothing, max_epochs=1, enable_checkpointing=True).fit(Moving(), loader, loader)
    assert float(callback.result.module.network.layers["net.head"].float_bias[0]) == 1


def test_weights_that_cannot_be_found_are_refused(make_trainer, loader, tmp_path):
    with pytest.raises(MisconfigurationException, match="needs a ModelCheckpoint that monitors a metric"):
        make_trainer(CalibTIP(ckpt_path="best"), max_epochs=1).fit(Moving(), loader, loader)
    with pytest.raises(FileNotFoundError, match=r"ckpt_path='.*nowhere.ckpt' means .*, which is no file"):
        quantized_bias(make_trainer, loader, tmp_path, ckpt_path=tmp_path / "nowhere.ckpt")


def test_a_second_fit_overwrites_nothing(tiny_classifier, loader, make_trainer):
    paths = []
    for _ in range(3):
        callback = CalibTIP("calibrate", calibration_samples=16)
        make_trainer(callback, max_epochs=1).fit(tiny_classifier, loader)
        paths.append(callback.checkpoint_path)
        assert callback.report_folder.name == f"{paths[-1].stem}_report"
    assert [path.name for path in paths] == ["quantized.ckpt", "quantized-v1.ckpt", "quantized-v2.ckpt"]
    assert all(path.exists() for path in paths)


def test_streams_without_a_length_work(tiny_classifier, images, make_trainer):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(image, 0) for image in images])

    callback = CalibTIP("calibrate", calibration_samples=20)
    stream = DataLoader(Stream(), batch_size=16)
    make_trainer(callback, max_epochs=1).fit(tiny_classifier, stream, stream)
    assert callback.result.calibration_samples == 32 and "val_loss" in callback.result.metrics
