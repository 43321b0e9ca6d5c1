"""Bit allocation: seconds of the integer program and of the sensitivities, and how well losses are predicted."""

import random
import time
from pathlib import Path
from typing import Any

import pulp
import torch
from torchmetrics.functional import spearman_corrcoef

from lightning_calibtip.allocation.integer_program import Budget, Solver, choose_candidates
from lightning_calibtip.allocation.sensitivity import base_bits, measure_sensitivity
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.network.network import QuantizedNetwork
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.quantization.spec import BitWidths
from lightning_calibtip.reconstruction.candidates import adaquant_candidates
from lightning_calibtip.reconstruction.options import AdaQuantOptions

from ..resnet_cifar10.data import CifarData
from ..resnet_cifar10.model import DEPTHS, CifarClassifier, ResNet
from .network import calibrate

_LAYERS = 1000
_CANDIDATES = [BitWidths(weight, activation) for weight in (2, 3, 4, 8) for activation in (4, 6, 8)]


def measure_solver(gap: float = 0.01) -> list[dict[str, Any]]:
    """A row for each installed solver: seconds for 1,000 layers, 12 candidates and two budgets (size and bit
    operations) of made-up tables."""
    generator = random.Random(0)
    layers = [f"layer{i}" for i in range(_LAYERS)]
    weights = {name: generator.randint(10**3, 10**6) for name in layers}
    operations = {name: generator.randint(10**5, 10**8) for name in layers}
    bits = {candidate: (candidate.weight or 32, candidate.activation or 32) for candidate in _CANDIDATES}
    losses = {name: {c: generator.random() * (2.0**-w + 2.0**-a) for c, (w, a) in bits.items()} for name in layers}
    sizes = {name: {c: count * w for c, (w, _) in bits.items()} for name, count in weights.items()}
    products = {name: {c: count * w * a for c, (w, a) in bits.items()} for name, count in operations.items()}
    budgets = [
        Budget("size", sizes, 4 * sum(weights.values())),
        Budget("bit operations", products, 20 * sum(operations.values())),
    ]
    rows = []
    for name in ("cbc", "highs") if pulp.HiGHS().available() else ("cbc",):
        started = time.perf_counter()
        choice = choose_candidates(losses, budgets, solver=Solver(name, gap=gap))
        row = {
            "solver": name,
            "layers": _LAYERS,
            "candidates": len(_CANDIDATES),
            "budgets": len(budgets),
            "gap": gap,
            "objective": choice.objective,
            "proved": choice.proved,
            "seconds": time.perf_counter() - started,
        }
        print(f"solver: {row}", flush=True)
        rows.append(row)
    return rows


def measure_replay(model: str = "resnet56", samples: int = 256) -> dict[str, Any]:
    """Seconds to measure all sensitivities (random weights, 2, 3 and 4 bits) by replay, and by whole forward passes."""
    torch.manual_seed(0)
    batches = torch.randn(samples, 3, 32, 32).split(64)
    network, calibration = calibrate(ResNet(DEPTHS[model]), batches, QuantizationScheme(4, 4))
    candidates = [BitWidths(2, 4), BitWidths(3, 4), BitWidths(4, 4)]
    loss = Loss(network, calibration)
    loss()
    started = time.perf_counter()
    measure_sensitivity(network, loss, candidates)
    replayed = time.perf_counter() - started
    started = time.perf_counter()
    measurements = _by_whole_passes(network, loss, candidates)
    whole = time.perf_counter() - started
    row = {
        "model": model,
        "samples": samples,
        "measurements": measurements,
        "replay_seconds": replayed,
        "whole_pass_seconds": whole,
        "ratio": replayed / whole,
    }
    print(f"sensitivity: {row}", flush=True)
    return row


def _by_whole_passes(network: QuantizedNetwork, loss: Loss, candidates: list[BitWidths]) -> int:
    base = base_bits(candidates)
    loss()
    measured = 1
    for name in network.searchable_layers:
        for bit_widths in candidates:
            if bit_widths != base:
                network.switch(name, bit_widths)
                loss()
                measured += 1
        network.switch(name, base)
    return measured


def measure_correlation(
    checkpoint: Path, data: str, samples: int = 1024, allocations: int = 30, iterations: int = 100
) -> dict[str, Any]:
    """Predicted and measured loss of random allocations of ResNet-20, and their Spearman correlation.

    Each layer's weights have 2, 3, 4 or 8 bits, drawn by itself, its activations 8; layers were reconstructed at each
    bit-width.
    """
    images = CifarData(data, samples, split="train")
    images.setup()
    candidates = [BitWidths(weight, 8) for weight in (2, 3, 4, 8)]
    batches = [batch[0] for batch in images.train_dataloader()]
    network, calibration = calibrate(CifarClassifier("resnet20", checkpoint).net, batches, QuantizationScheme(8, 8))
    options = AdaQuantOptions(mode="parallel", granularity="layer", iterations=iterations)
    adaquant_candidates(network, calibration, options, candidates)
    loss = Loss(network, calibration)
    table = measure_sensitivity(network, loss, candidates)
    generator = random.Random(0)
    predicted, measured = [], []
    for _ in range(allocations):
        chosen = {name: generator.choice(candidates) for name in network.searchable_layers}
        for name, bit_widths in chosen.items():
            network.switch(name, bit_widths)
        predicted.append(sum(table.rise(name, bit_widths) for name, bit_widths in chosen.items()))
        measured.append(loss() - table.base_loss)
    result = {
        "model": "resnet20",
        "allocations": allocations,
        "spearman": float(spearman_corrcoef(torch.tensor(predicted), torch.tensor(measured))),
        "predicted": predicted,
        "measured": measured,
    }
    print(f"correlation: {result['spearman']:.3f} over {allocations} random allocations", flush=True)
    return result
