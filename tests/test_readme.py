import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_calibtip import Calibration, QuantizationModule
from lightning_calibtip.pipeline.runner import run_stages
from recipes.command_line import run_recipe
from recipes.resnet_cifar10.__main__ import main

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


class QuietTrainer(pl.Trainer):
    """The README's Trainer, kept short and silent."""

    def __init__(self, **options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        super().__init__(**{**options, **quiet, "max_epochs": 1})


@pytest.mark.parametrize(
    "code",
    BLOCKS,
    ids=[
        "callback on the Trainer",
        "stages on a finished model",
        "options of AdaQuant",
        "options of BitAllocation",
        "export",
    ],
)
def test_readme_code_runs_as_written(code, tiny_classifier, loader, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", QuietTrainer)
    # Few steps are enough to see that the code runs.
    monkeypatch.setattr("lightning_calibtip.reconstruction.options.AdaQuantOptions.rate_at", lambda self, step: 0.1)
    short = code.replace('AdaQuant(mode="sequential")', 'AdaQuant(mode="sequential", iterations=3)')
    short = short.replace("calibration_samples=512", 'calibration_samples=48, options={"adaquant": {"iterations": 3}}')
    names = {
        "model": tiny_classifier,
        "train_loader": loader,
        "val_loader": loader,
        "calibration_loader": loader,
        "batch": images[:8],
    }
    exec(short, names)
    printed = capsys.readouterr().out
    if "report" in names:
        assert "QLinearConv" in printed and (tmp_path / "model.onnx").exists()
        with torch.no_grad():
            assert torch.equal(names["module"](images), names["run"].module(images))
    elif "quantizer" in names:
        assert "val_acc" in printed and names["quantizer"].checkpoint_path.exists()
    elif "cheapest" in names:
        for stage in (names["stage"], names["cheapest"]):
            QuietTrainer(callbacks=[Calibration(), stage]).fit(QuantizationModule(tiny_classifier), loader)
        assert len(names["stage"].allocation.curve) == 3 and names["stage"].result.figures["compression"] <= 0.16
        assert names["cheapest"].result.figures["measured_loss"] <= 0.02
    elif "stage" in names:
        names["stage"].options = replace(names["stage"].options, iterations=2)
        module = QuantizationModule(tiny_classifier, weight_bits=4)
        run_stages(module, [Calibration(), names["stage"]], loader)
        assert names["stage"].result.figures["units"] == 5 and (tmp_path / "runs" / "state").exists()
    else:
        assert "6 quantized, 5 folded, 0 float" in printed
        with torch.no_grad():
            assert names["quantized"](images).shape == (48, 4)
        assert (tmp_path / "quantized.ckpt").exists()


def test_readme_leads_with_the_two_commands():
    head = README.read_text()[:800]
    assert "make quickstart" in head and "make test" in head


def test_readme_recipe_command_runs_as_written(tmp_path, tiny_cifar, cifar_checkpoint):
    command = re.search(r"python -m recipes.resnet_cifar10 (.*?)```", README.read_text(), re.DOTALL).group(1)
    words = shlex.split(command.replace("\\\n", " "))
    values = dict(zip(words[::2], words[1::2], strict=True))
    assert values["--data"] == "cifar10" and values["--output"].startswith("runs/")
    values |= {"--checkpoint": str(cifar_checkpoint), "--data": str(tiny_cifar), "--output": str(tmp_path / "out")}
    values |= {"--calibration_samples": "32", "--adaquant.iterations": "2", "--accelerator": "cpu"}
    run_recipe(main, [word for pair in values.items() for word in pair])
    assert (tmp_path / "out" / "result.json").exists() and (tmp_path / "out" / "quantized.ckpt").exists()


def test_recipe_takes_its_options_from_yaml(tmp_path, tiny_cifar, cifar_checkpoint):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"checkpoint: {cifar_checkpoint}\ndata: {tiny_cifar}\npipeline: calibrate\nweight_bits: 5\n"
        f"calibration_samples: 16\naccelerator: cpu\noutput: {tmp_path / 'yaml'}\n"
    )
    run_recipe(main, ["--config", str(config)])
    record = json.loads((tmp_path / "yaml" / "result.json").read_text())
    assert record["layers"][1]["weight_bits"] == 5
