import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from lightning_calibtip import QuantizationModule, QuantizationScheme
from lightning_calibtip.allocation.table import read_table
from recipes.output import make_logger
from recipes.resnet_cifar10.__main__ import main
from recipes.resnet_cifar10.data import CifarData, load_images
from recipes.resnet_cifar10.model import DEPTHS, CifarClassifier


@pytest.mark.parametrize("name,layers", [("resnet20", 20), ("resnet32", 32), ("resnet44", 44), ("resnet56", 56)])
def test_networks_have_as_many_layers_as_they_say(name, layers):
    net = CifarClassifier(name).net
    weights = [key for key, value in net.state_dict().items() if key.endswith("weight") and value.dim() > 1]
    assert len(weights) == layers
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer3.0.bn2.bias", "linear.bias"} <= net.state_dict().keys()


@pytest.mark.parametrize("pipeline", ["sequential", "advanced", "mixed"])
def test_recipe_writes_record_and_checkpoint(pipeline, tiny_cifar, cifar_checkpoint, tmp_path):
    output = tmp_path / "out"
    main(
        cifar_checkpoint,
        data=str(tiny_cifar),
        pipeline=pipeline,
        calibration_samples=32,
        options={
            "adaquant": {"iterations": 2},
            "preparation": {"iterations": 2},
            "allocation": {"candidates": [[2, 8], [4, 8], [8, 8]], "checks": 2},
            "bias_tuning": {"epochs": 1},
        },
        accelerator="cpu",
        logger="csv",
        output=output,
    )
    record = json.loads((output / "result.json").read_text())
    assert (record["recipe"], record["model"], record["metric"]) == ("resnet_cifar10", "resnet20", "top1")
    assert record["calibration_samples"] == 32 and len(record["layers"]) == 20 + 9 + 1
    assert record["size"]["ratio"] < 0.2
    bits = {layer["name"]: layer["weight_bits"] for layer in record["layers"]}
    assert bits["net.conv1"] == bits["net.linear"] == 8 and 4 in bits.values()
    pictures = {path.stem for path in output.glob("*.png")}
    assert {"layers", "histograms"} <= pictures
    assert ({"allocation", "sensitivity"} <= pictures) == (pipeline != "sequential")
    assert any(name.startswith("reconstruction") for name in pictures)
    assert "<h2>Layers</h2>" in (output / "report.html").read_text()
    if pipeline != "sequential":
        assert len(read_table(output / "sensitivity.csv").losses) == 18
    assert not (output / "unfinished").exists() and (output / "model.onnx").stat().st_size > 200_000
    assert "Calibration/top1" in (output / "log" / "metrics.csv").read_text()
    loaded = QuantizationModule.load_from_checkpoint(output / "quantized.ckpt", model=CifarClassifier("resnet20"))
    images = load_images(str(tiny_cifar), "test")[:][0]
    with torch.no_grad():
        answers = loaded(images).argmax(1)
    labels = load_images(str(tiny_cifar), "test")[:][1]
    assert record["quantized"] == pytest.approx(float((answers == labels).float().mean()))


def test_train_split_evaluates_on_images_that_are_not_calibrated_on(tiny_cifar):
    data = CifarData(str(tiny_cifar), calibration_samples=32, split="train")
    data.setup()
    everything = load_images(str(tiny_cifar), "train")[:][0]
    assert torch.equal(data.calibration[:][0], everything[:32])
    assert torch.equal(data.evaluation[:][0], everything[32:])


def test_weights_and_biases_logger_works_offline(tmp_path):
    logger = make_logger("wandb", tmp_path, "calibtip-test")
    logger.log_metrics({"Calibration/top1": 0.5}, step=1)
    logger.experiment.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_bad_input_is_named(tiny_cifar, cifar_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint of resnet56; check --model"):
        CifarClassifier("resnet56", cifar_checkpoint)
    with pytest.raises(ValueError, match=r"model must be one of resnet20, .* got 'resnet18'"):
        CifarClassifier("resnet18")
    with pytest.raises(ValueError, match=r"calibration_samples=49, but .* has 48 images"):
        CifarData(str(tiny_cifar), calibration_samples=49).setup()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no train\*\.parquet"):
        load_images(str(empty), "train")
    with pytest.raises(ValueError, match="logger must be wandb, csv or none, got 'tensorboard'"):
        make_logger("tensorboard", tmp_path, "project")
    assert DEPTHS.keys() == {"resnet20", "resnet32", "resnet44", "resnet56"}


def test_real_resnet20_keeps_its_accuracy_at_8_bits(data_folder, tmp_path):
    """Ranges only, on a part of the training images that is neither calibrated on nor reported."""
    main(
        data_folder / "cifar10" / "resnet20.pt",
        data=str(data_folder / "cifar10"),
        pipeline="calibrate",
        scheme=QuantizationScheme(8, 8),
        calibration_samples=256,
        split="train",
        accelerator="cpu",
        output=tmp_path,
    )
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["float"] > 0.95
    assert record["quantized"] > record["float"] - 0.005


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_calibtip.reconstruction.adam import Adam
from recipes.resnet_cifar10.__main__ import main

step, calls = Adam.step, []

def dying(self, factor):
    calls.append(None)
    if len(calls) == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, factor)

Adam.step = dying
data, checkpoint, output = map(Path, sys.argv[1:])
options = {"adaquant": {"iterations": 3}}
main(checkpoint, str(data), calibration_samples=32, accelerator="cpu", options=options, output=output)
"""


def test_a_killed_recipe_goes_on_in_its_output_folder(tiny_cifar, cifar_checkpoint, tmp_path):
    options = {"data": str(tiny_cifar), "calibration_samples": 32, "accelerator": "cpu"}
    options["options"] = {"adaquant": {"iterations": 3}}
    main(cifar_checkpoint, output=tmp_path / "whole", **options)
    command = [sys.executable, "-c", KILLED, str(tiny_cifar), str(cifar_checkpoint), str(tmp_path / "killed")]
    # Sums of another number of threads would round otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(command, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # 24 steps were taken: 8 units of 3.
    assert len(list((tmp_path / "killed").rglob("*.pt"))) == 8
    assert not (tmp_path / "killed" / "result.json").exists()
    main(cifar_checkpoint, output=tmp_path / "killed", **options)
    ours, theirs = (
        torch.load(tmp_path / name / "quantized.ckpt", weights_only=True)["state_dict"] for name in ("whole", "killed")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not (tmp_path / "killed" / "unfinished").exists()
    assert {"quantized.ckpt", "result.json", "report.html"} <= {p.name for p in (tmp_path / "killed").iterdir()}


def test_a_recipe_with_a_target_exports_and_reports_it(tiny_cifar, cifar_checkpoint, tmp_path):
    main(
        cifar_checkpoint,
        data=str(tiny_cifar),
        pipeline="calibrate",
        calibration_samples=32,
        accelerator="cpu",
        output=tmp_path,
        scheme=QuantizationScheme(target="onnxruntime"),
    )
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["exports"][0]["counts"]["QLinearConv"] == 19 and "export" in record["report_items"]
    assert (tmp_path / "model.onnx").stat().st_size == record["exports"][0]["file_bytes"]
    assert "QLinearAdd" in (tmp_path / "export.csv").read_text()
