"""What a step of AdaQuant costs against the float layer's own forward and backward pass."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.options import AdaQuantOptions

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

    The float layer computes in the default memory format, as in the user's model; AdaQuant chooses channels-last for
    convolutions. ``channels_last_float_seconds`` is the float layer's time in that format.
    """
    rows = []
    for shape, (make, size) in SHAPES.items():
        torch.manual_seed(0)
        inputs = torch.randn(4 * BATCH, *size).relu()
        layer, model = make(), nn.Sequential(make())
        network, calibration = calibrate(model, inputs.split(BATCH), QuantizationScheme(4, 4, edge_bits=None), "minmax")
        options = AdaQuantOptions(mode="parallel", granularity="layer", iterations=steps, batch_size=BATCH)
        gradient = torch.randn_like(layer(inputs[:BATCH]))
        rounds_of_both = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            _run_float(layer, inputs, gradient, steps)
            middle = time.perf_counter()
            _run_float(layer, _channels_last(inputs), _channels_last(gradient), steps)
            seconds = (middle - started) / steps, (time.perf_counter() - middle) / steps
            rounds_of_both.append((*seconds, adaquant(network, calibration, options)[0].seconds / steps))
        # The first round warms up.
        medians = [statistics.median(column) for column in zip(*rounds_of_both[1:], strict=True)]
        rows.append(
            {
                "shape": shape,
                "float_seconds": medians[0],
                "channels_last_float_seconds": medians[1],
                "step_seconds": medians[2],
                "ratio": statistics.median(step / bare for bare, _, step in rounds_of_both[1:]),
            }
        )
        print(f"step: {rows[-1]}", flush=True)
    return rows


def _run_float(layer: nn.Module, inputs: Tensor, gradient: Tensor, steps: int) -> None:
    for step in range(steps):
        first = step % 4 * BATCH
        layer.zero_grad()
        layer(inputs[first : first + BATCH]).backward(gradient)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
