"""Seconds of every stage of the sequential pipeline beside AdaQuant's, and of calibration beside float passes."""

import time
from typing import Any

import torch
from torchvision.models import mobilenet_v2

from lightning_calibtip import QuantizationModule
from lightning_calibtip.pipeline.presets import make_stages
from lightning_calibtip.pipeline.runner import run_stages

SAMPLES, BATCH, SIDE = 100, 25, 224


def measure_stages(samples: int = SAMPLES, side: int = SIDE, iterations: int = 120) -> list[dict[str, Any]]:
    """A row for each stage: its seconds, and those over AdaQuant's and over those of a plain float pass.

    A MobileNet-v2 (random weights) at W4A4 on images of noise; 120 steps of 8 images a unit, as for so few images. In
    the row of AdaQuant, ``outside_steps`` is the share of its time that is not spent on the optimiser's steps and the
    trial of what they came to.

    Args:
        samples: Number of images.
        side: Their height and width.
        iterations: Steps of AdaQuant for each unit.
    """
    torch.manual_seed(0)
    model = mobilenet_v2().eval()
    batches = list(torch.randn(samples, 3, side, side).split(BATCH))
    with torch.no_grad():
        model(batches[0])
        started = time.perf_counter()
        for batch in batches:
            model(batch)
        float_seconds = time.perf_counter() - started
    options = {"adaquant": {"iterations": iterations, "batch_size": 8}, "seed": 0}
    calibration, *stages = make_stages("sequential", options)
    module = QuantizationModule(model, weight_bits=4, activation_bits=4)
    started = time.perf_counter()
    run_stages(module, [calibration], batches)
    # A stage's own seconds begin when its epoch has ended, and calibration observes during the epoch.
    calibration_seconds = time.perf_counter() - started
    run_stages(module, stages, batches)
    (adaquant,) = (stage for stage in stages if stage.name == "AdaQuant")
    seconds = {calibration.name: calibration_seconds, **{stage.name: stage.seconds for stage in stages}}
    rows = [
        {"stage": name, "seconds": each, "over_adaquant": each / adaquant.seconds, "over_float": each / float_seconds}
        for name, each in seconds.items()
    ]
    for row in rows:
        if row["stage"] == adaquant.name:
            row["outside_steps"] = 1 - adaquant.result.figures["step_seconds"] / adaquant.seconds
        print(f"stages: {row}", flush=True)
    return rows
