"""Seconds of every stage of the sequential pipeline beside AdaQuant's, and of calibration beside float passes."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from lightning_calibtip import Calibration, QuantizationModule
from lightning_calibtip.pipeline.presets import make_stages
from lightning_calibtip.pipeline.runner import run_stages

SAMPLES, BATCH, SIDE = 100, 25, 224


def measure_stages(samples: int = SAMPLES, side: int = SIDE, iterations: int = 120) -> list[dict[str, Any]]:
    """A row for each stage: its seconds, and those over AdaQuant's and over those of a plain float pass.

    A MobileNet-v2 (random weights) at W4A4 on images of noise; 120 steps of 8 images a unit, as for so few images. In
    the row of AdaQuant, ``outside_steps`` is the share of its time that is not spent on the optimiser's steps and the
    trial of what they came to. In that of calibration, ``over_float_of_many`` is for four times as many images: what
    is done once for a model then weighs less.

    Args:
        samples: Number of images.
        side: Their height and width.
        iterations: Steps of AdaQuant for each unit.
    """
    torch.manual_seed(0)
    model = mobilenet_v2().eval()
    batches = list(torch.randn(samples, 3, side, side).split(BATCH))
    calibration_seconds, over_float, module = _calibrate(model, batches)
    stages = make_stages("sequential", {"adaquant": {"iterations": iterations, "batch_size": 8}, "seed": 0})[1:]
    run_stages(module, stages, batches)
    (adaquant,) = (stage for stage in stages if stage.name == "AdaQuant")
    float_seconds = calibration_seconds / over_float
    seconds = {"Calibration": calibration_seconds, **{stage.name: stage.seconds for stage in stages}}
    rows = [
        {"stage": name, "seconds": each, "over_adaquant": each / adaquant.seconds, "over_float": each / float_seconds}
        for name, each in seconds.items()
    ]
    rows[0]["over_float_of_many"] = _calibrate(model, batches * 4)[1]
    for row in rows:
        if row["stage"] == adaquant.name:
            row["outside_steps"] = 1 - adaquant.result.figures["step_seconds"] / adaquant.seconds
        print(f"stages: {row}", flush=True)
    return rows


def _calibrate(model: nn.Module, batches: Sequence[Tensor]) -> tuple[float, float, QuantizationModule]:
    """Seconds of calibration, the same over those of plain float passes, and the calibrated module."""
    with torch.no_grad():
        model(batches[0])
        started = time.perf_counter()
        for batch in batches:
            model(batch)
        float_seconds = time.perf_counter() - started
    module = QuantizationModule(model, weight_bits=4, activation_bits=4)
    started = time.perf_counter()
    run_stages(module, [Calibration()], batches)
    # A stage's own seconds begin when its epoch has ended, and calibration observes during the epoch.
    seconds = time.perf_counter() - started
    return seconds, seconds / float_seconds, module
