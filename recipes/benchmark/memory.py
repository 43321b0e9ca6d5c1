"""Peak memory of reconstruction against the number of calibration images, under a fixed budget."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_calibtip.calibration.activation_store import ActivationStore
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.options import AdaQuantOptions

from ..resnet_cifar10.model import ResNet
from .network import calibrate

SAMPLES = (256, 512, 1024, 2048)
BUDGET = 160 * 2**20


def measure_memory() -> list[dict[str, Any]]:
    """A row for each number of images: bytes captured at once, the budget, and peak resident bytes above what the
    calibrated model and its data take, each measured in a process of its own."""
    rows = []
    for samples in SAMPLES:
        command = [sys.executable, "-m", __name__, "--samples", str(samples), "--budget", str(BUDGET)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(f"memory: {rows[-1]}", flush=True)
    return rows


def measure_here(samples: int, budget: int, iterations: int = 10) -> dict[str, int]:
    """One row, of this process."""
    torch.manual_seed(0)
    images = torch.randn(samples, 3, 32, 32)
    network, calibration = calibrate(ResNet(3), images.split(32), QuantizationScheme(4, 4))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with ActivationStore(budget) as store:
        adaquant(network, calibration, AdaQuantOptions(granularity="layer", iterations=iterations), store)
    peak = _resident("VmHWM") - before
    return {"samples": samples, "captured_bytes": store.most_held, "budget_bytes": budget, "peak_bytes": peak}


def _resident(field: str) -> int:
    """Resident memory (``VmRSS``) or its peak (``VmHWM``) of this process in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--budget", type=int, required=True)
    print(json.dumps(measure_here(**vars(parser.parse_args()))))
