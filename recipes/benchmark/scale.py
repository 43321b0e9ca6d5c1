"""Time of each stage at several sizes, in plain float passes, beside the law that it follows."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_calibtip import QuantizationModule
from lightning_calibtip.allocation.sensitivity import measure_sensitivity
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.pipeline.presets import make_stages
from lightning_calibtip.pipeline.runner import run_stages
from lightning_calibtip.quantization.spec import BitWidths
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.reconstruction.units import find_units

from ..resnet_cifar10.model import DEPTHS, ResNet
from .network import calibrate

# Networks and numbers of samples.
SIZES = (("resnet20", 256), ("resnet32", 512), ("resnet56", 256))
_BATCH, _STEP_SAMPLES = 64, 32
_CANDIDATES = (BitWidths(2, 4), BitWidths(3, 4), BitWidths(4, 4))


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Args:
        units: Units of reconstruction.
        layers: Layers with bit-widths to choose.
        samples: Calibration samples.
        steps: Optimiser steps for each unit.
        step_samples: Samples of a step.
        epochs: Epochs of bias tuning.
    """

    units: int
    layers: int
    samples: int
    steps: int
    step_samples: int
    epochs: int


# What the seconds of a stage are proportional to, in plain float passes over all samples; docs/scale.md explains them.
LAWS: dict[str, Callable[[Size], float]] = {
    "Calibration": lambda size: 1 + 4 * _BATCH / size.samples,
    "Equalization": lambda size: min(128, size.samples) / size.samples,
    "BatchNormTuning": lambda size: 1.0,
    "AdaQuant, sequential": lambda size: 2 + size.steps * size.step_samples / size.samples,
    "AdaQuant, parallel": lambda size: 1 + size.steps * size.step_samples / size.samples,
    "BiasTuning": lambda size: float(size.epochs),
    "sensitivity": lambda size: len(_CANDIDATES) * size.layers / 2,
}


def measure_scale(steps: int = 60) -> list[dict[str, Any]]:
    """A row for each stage and size: seconds over those of a plain float pass, and these over what the law says.

    The law holds if that factor is the same at all sizes. ResNets with random weights on noise, W4A4.

    Args:
        steps: Optimiser steps for each unit, of 32 samples.
    """
    rows = []
    for model, samples in SIZES:
        size, passes = _measure(model, samples, steps)
        for stage, measured in passes.items():
            law = LAWS[stage](size)
            row = {
                "stage": stage,
                "model": model,
                "units": size.units,
                "samples": samples,
                "passes": round(measured, 2),
                "law": round(law, 2),
                "factor": round(measured / law, 2),
            }
            print(f"scale: {row}", flush=True)
            rows.append(row)
    return rows


def scale_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each stage: the passes that were measured, and what they are over the law, at each size.

    Example:
        >>> row = {"stage": "A", "model": "net", "samples": 8, "units": 2, "passes": 6.0, "law": 2.0, "factor": 3.0}
        >>> print(scale_table([row]))
        | stage | net, 8 samples: passes (over the law) |
        | --- | --- |
        | A | 6.0 (3.0) |
    """
    sizes = list(dict.fromkeys((row["model"], row["samples"]) for row in rows))
    cells: dict[str, list[str]] = {}
    for row in rows:
        cells.setdefault(row["stage"], []).append(f"{row['passes']} ({row['factor']})")
    heads = [f"{model}, {samples} samples: passes (over the law)" for model, samples in sizes]
    table = [["stage", *heads], ["---"] * (1 + len(heads)), *([stage, *each] for stage, each in cells.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _measure(model: str, samples: int, steps: int) -> tuple[Size, dict[str, float]]:
    torch.manual_seed(0)
    net = ResNet(DEPTHS[model]).eval()
    batches = list(torch.randn(samples, 3, 32, 32).split(_BATCH))
    # More epochs than one end early where they do not help.
    epochs = 1
    options = {"adaquant": {"iterations": steps}, "bias_tuning": {"epochs": epochs}, "seed": 0}
    calibration, *stages = make_stages("sequential", options)
    module = QuantizationModule(net, weight_bits=4, activation_bits=4)
    plain = ResNet(DEPTHS[model]).eval()

    def passes(work: Callable[[], Any]) -> float:
        """Time of some work in float passes, which are timed before and after it: machines are not steady."""
        before = _seconds(lambda: _pass(plain, batches))
        of_work = _seconds(work)
        return of_work / ((before + _seconds(lambda: _pass(plain, batches))) / 2)

    _pass(plain, batches)
    # Calibration observes during the epoch; of the others the epoch does nothing but keep the batches.
    found = {"Calibration": passes(lambda: run_stages(module, [calibration], batches))}
    names = {"AdaQuant": "AdaQuant, sequential"}
    for stage in stages:
        found[names.get(stage.name, stage.name)] = passes(partial(run_stages, module, [stage], batches))
    network, calibration_set = calibrate(ResNet(DEPTHS[model]), batches, QuantizationScheme(4, 4))
    parallel = AdaQuantOptions(mode="parallel", iterations=steps)
    found["AdaQuant, parallel"] = passes(lambda: adaquant(network, calibration_set, parallel))
    network.reset_to_float()
    loss = Loss(network, calibration_set)
    found["sensitivity"] = passes(lambda: measure_sensitivity(network, loss, list(_CANDIDATES)))
    units = find_units(network, "block")
    size = Size(len(units), len(network.searchable_layers), samples, steps, min(_STEP_SAMPLES, samples), epochs)
    return size, found


@torch.no_grad()
def _pass(net: torch.nn.Module, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        net(batch)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
