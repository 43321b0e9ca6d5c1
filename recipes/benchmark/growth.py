"""How seconds and passes of reconstruction grow with depth, sequential against parallel."""

import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.options import MODES, AdaQuantOptions

from ..resnet_cifar10.model import DEPTHS, ResNet
from .network import calibrate

_PASS_SAMPLES = 256


def measure_growth(iterations: int = 100, samples: int = 1024) -> list[dict[str, Any]]:
    """A row for each ResNet (random weights): units, seconds of both modes, and passes of the sequential one.

    A pass is one computation of the whole network over the calibration set. Passes are counted in floating-point
    operations, with one optimiser step of one sample a unit, so that what remains is what the engine itself computes.
    """
    rows = []
    for name, blocks in DEPTHS.items():
        seconds = {}
        for mode in MODES:
            network, calibration = _network(blocks, samples)
            options = AdaQuantOptions(mode=mode, granularity="layer", iterations=iterations)
            started = time.perf_counter()
            units = len(adaquant(network, calibration, options))
            seconds[mode] = time.perf_counter() - started
        row = {
            "model": name,
            "units": units,
            "parallel_seconds": seconds["parallel"],
            "sequential_seconds": seconds["sequential"],
            "passes": count_passes(blocks),
        }
        print(f"growth: {row}", flush=True)
        rows.append(row)
    return rows


def count_passes(blocks: int) -> float:
    """Whole-network passes of sequential reconstruction, by floating-point operations."""
    network, calibration = _network(blocks, _PASS_SAMPLES)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        for index in range(len(calibration)):
            calibration.run(index)
    with FlopCounterMode(display=False) as all_passes:
        adaquant(network, calibration, AdaQuantOptions(granularity="layer", iterations=1, batch_size=1))
    return all_passes.get_total_flops() / one.get_total_flops()


def _network(blocks: int, samples: int) -> Any:
    torch.manual_seed(0)
    return calibrate(ResNet(blocks), torch.randn(samples, 3, 32, 32).split(64), QuantizationScheme(4, 4))
