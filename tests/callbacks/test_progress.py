"""Progress of stages through the Trainer's progress bar."""

import io
import sys

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_calibtip import AdaQuant, BiasTuning, BitAllocation, Calibration, CalibTIP, QuantizationModule


class Terminal(io.StringIO):
    def isatty(self):
        return True


def stages():
    return [Calibration(), AdaQuant(iterations=26), BitAllocation(compression=0.2, checks=0), BiasTuning(epochs=1)]


def fit(tiny_classifier, loader, make_trainer, monkeypatch, output, *bar, **options):
    monkeypatch.setattr(sys, "stdout", output)
    make_trainer(*stages(), *bar, **options).fit(QuantizationModule(tiny_classifier, weight_bits=4), loader)
    return output.getvalue()


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_each_stage_has_a_bar_with_layer_and_error(bar, tiny_classifier, loader, make_trainer, monkeypatch):
    options = {"enable_progress_bar": True}
    if bar is RichProgressBar:
        bar = RichProgressBar(console_kwargs={"force_terminal": True, "width": 200, "file": (output := Terminal())})
    else:
        bar, output = TQDMProgressBar(), Terminal()
    shown = fit(tiny_classifier, loader, make_trainer, monkeypatch, output, bar, **options)
    assert "AdaQuant: net.blocks.0: relative error" in shown
    assert "BitAllocation: net.blocks.0.conv1 at W4A4: loss" in shown
    assert "BiasTuning: epoch 0: divergence" in shown


def test_in_a_file_there_is_a_line_for_a_stage(tiny_classifier, loader, make_trainer, monkeypatch):
    output = io.StringIO()
    shown = fit(tiny_classifier, loader, make_trainer, monkeypatch, output, TQDMProgressBar(), enable_progress_bar=True)
    lines = [line for line in shown.splitlines() if line.startswith("AdaQuant/")]
    assert len(lines) == 1 and "AdaQuant/seconds" in lines[0]
    assert "AdaQuant: net.blocks.0: relative error" not in shown


def test_without_a_progress_bar_nothing_is_shown(tiny_classifier, loader, make_trainer, monkeypatch):
    for output in (Terminal(), io.StringIO()):
        assert fit(tiny_classifier, loader, make_trainer, monkeypatch, output, enable_progress_bar=False) == ""


@pytest.mark.parametrize("kind", ["tqdm", "rich", "own"])
def test_the_whole_pipeline_shows_its_bars_below_a_training_that_has_one(
    kind, tiny_classifier, loader, make_trainer, monkeypatch
):
    class Own(TQDMProgressBar):
        def __init__(self, title):
            super().__init__()
            self.title = title

    output = Terminal()
    monkeypatch.setattr(sys, "stdout", output)
    rich_options = {"force_terminal": True, "width": 200, "file": output}
    bars = {
        "tqdm": TQDMProgressBar,
        "rich": lambda: RichProgressBar(console_kwargs=rich_options),
        "own": lambda: Own("t"),
    }
    callback = CalibTIP(calibration_samples=32, options={"adaquant": {"iterations": 2}})
    make_trainer(callback, bars[kind](), enable_progress_bar=True, max_epochs=1).fit(tiny_classifier, loader)
    assert callback.report_folder.is_dir()
    assert "AdaQuant: net.blocks.0: relative error" in output.getvalue()


def test_in_a_file_the_pipeline_writes_a_line_for_each_stage(tiny_classifier, loader, make_trainer, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    callback = CalibTIP("calibrate", calibration_samples=32)
    make_trainer(callback, TQDMProgressBar(), enable_progress_bar=True, max_epochs=1).fit(tiny_classifier, loader)
    assert sum(line.startswith("Calibration/") for line in output.getvalue().splitlines()) == 1
