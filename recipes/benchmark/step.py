"""What a step of AdaQuant costs against the float layer's own forward and backward pass."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_calibtip.quantization.scheme import QuantizationScheme
from lightning_calibtip.reconstruction.adaquant import Reconstruction, adaquant
from lightning_calibtip.reconstruction.settings import AdaQuantSettings

from .network import calibrate

BATCH = 32
SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3x3 convolution, 16 to 16 channels, 32 x 32": (lambda: nn.Conv2d(16, 16, 3, padding=1), (16, 32, 32)),
    "3x3 convolution, 32 to 32 channels, 16 x 16": (lambda: nn.Conv2d(32, 32, 3, padding=1), (32, 16, 16)),
    "3x3 convolution, 64 to 64 channels, 8 x 8": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8)),
    "1x1 convolution, 64 to 256 channels, 14 x 14": (lambda: nn.Conv2d(64, 256, 1), (64, 14, 14)),
    "3x3 depthwise, 144 channels, 28 x 28": (lambda: nn.Conv2d(144, 144, 3, padding=1, groups=144), (144, 28, 28)),
    "linear, 384 to 1536, 128 positions": (lambda: nn.Linear(384, 1536), (128, 384)),
}


def measure_step(steps: int = 100, rounds: int = 5) -> list[dict[str, Any]]:
    """A row for each layer shape: seconds of the float layer's forward pass and backward pass to its weights, and of a
    straight-through step of AdaQuant with the default settings, both on 32 samples; the median of several rounds of
    both in turn.
    """
    rows = []
    for shape, (make, size) in SHAPES.items():
        torch.manual_seed(0)
        inputs = torch.randn(4 * BATCH, *size).relu()
        layer, model = make(), nn.Sequential(make())
        network, calibration = calibrate(model, inputs.split(BATCH), QuantizationScheme(4, 4, None), "minmax")
        how = Reconstruction(AdaQuantSettings(iterations=steps, batch_size=BATCH), "parallel", "layer")
        gradient = torch.randn_like(layer(inputs[:BATCH]))
        rounds_of_both = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            for step in range(steps):
                first = step % 4 * BATCH
                layer.zero_grad()
                layer(inputs[first : first + BATCH]).backward(gradient)
            middle = time.perf_counter()
            result = adaquant(network, calibration, how)[0]
            rounds_of_both.append(((middle - started) / steps, result.seconds / steps))
        # The first round warms up.
        float_seconds, step_seconds = (statistics.median(column) for column in zip(*rounds_of_both[1:], strict=True))
        ratio = statistics.median(b / a for a, b in rounds_of_both[1:])
        rows.append({"shape": shape, "float_seconds": float_seconds, "step_seconds": step_seconds, "ratio": ratio})
        print(f"step: {rows[-1]}", flush=True)
    return rows
