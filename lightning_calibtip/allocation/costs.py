"""What each layer costs at each candidate width: tables for the integer program."""

import csv
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..calibration.calibration_set import CalibrationSet, batch_size
from ..quantization.kinds import layer_kind
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits, check_pair

log = logging.getLogger(__name__)

CostTable = dict[str, dict[Bits, float]]
LatencyTable = Mapping[str, Mapping[Any, float]]

FLOAT: Bits = (32, 32)


@dataclass(frozen=True)
class Work:
    """What a layer does for one sample: multiply-accumulates, and elements of its input, over all its calls."""

    multiply_accumulates: float
    input_elements: float


def open_candidates(network: QuantizedNetwork, candidates: Sequence[Bits]) -> dict[str, list[Bits]]:
    """The widths that each quantizable layer may take: the candidates if it is free, else the one that it has."""
    options = {
        name: list(candidates) if name in network.free_layers else [network.layers[name].bits]
        for name in network.layers
    }
    return {**options, **{name: [FLOAT] for name in network.floats}}


def weight_ratios(network: QuantizedNetwork, options: Mapping[str, Sequence[Bits]]) -> CostTable:
    """Bits of each layer's weights over those of all quantizable weights as float32: they add up to the paper's
    compression."""
    weights = {name: network.weights_of(name) for name in options}
    whole = 32 * sum(weights.values())
    return {name: {bits: weights[name] * bits[0] / whole for bits in of_layer} for name, of_layer in options.items()}


def weight_bytes(network: QuantizedNetwork, options: Mapping[str, Sequence[Bits]]) -> CostTable:
    """Bytes of each layer's weights."""
    return {
        name: {bits: network.weights_of(name) * bits[0] / 8 for bits in of_layer} for name, of_layer in options.items()
    }


def bit_operations(
    work: Mapping[str, Work], options: Mapping[str, Sequence[Bits]], products: Collection[str] = ()
) -> CostTable:
    """Bit operations (BOPs) a sample: multiply-accumulates times bits of the weight times bits of the input.

    In ``products``, which have no weight, both factors have the bits of the input.
    """
    return {
        name: {
            bits: work[name].multiply_accumulates * bits[1 if name in products else 0] * bits[1] for bits in of_layer
        }
        for name, of_layer in options.items()
    }


def activation_bytes(work: Mapping[str, Work], options: Mapping[str, Sequence[Bits]]) -> CostTable:
    """Bytes of each layer's quantized input for one sample; their sum is what all inputs take together."""
    return {
        name: {bits: work[name].input_elements * bits[1] / 8 for bits in of_layer} for name, of_layer in options.items()
    }


def latencies(table: LatencyTable, options: Mapping[str, Sequence[Bits]]) -> CostTable:
    """A measured latency for each layer and candidate.

    Args:
        table: Layer -> width, or pair ``(weight_bits, activation_bits)`` -> latency, in any unit. Layers that are left
            float have the width 32, or are missing and then count nothing.
        options: Widths of each layer.

    Raises:
        ValueError: If the table names an unknown layer, or lacks a quantized layer or one of its widths.
    """
    if unknown := [name for name in table if name not in options]:
        raise ValueError(
            f"latency_table: {', '.join(map(repr, unknown))} is no quantizable layer; these are: {', '.join(options)}."
        )
    costs: CostTable = {}
    for name, of_layer in options.items():
        what = f"latency_table[{name!r}]"
        known = {_width(bits, what): float(value) for bits, value in table.get(name, {}).items()}
        if of_layer == [FLOAT] and name not in table:
            known[FLOAT] = 0.0
        if missing := [bits for bits in of_layer if bits not in known]:
            raise ValueError(f"latency_table lacks {name!r} at (weight_bits, activation_bits) {missing}.")
        costs[name] = {bits: known[bits] for bits in of_layer}
    return costs


def _width(key: Any, what: str) -> Bits:
    """A key of a latency table as a pair of widths; one width may be given as text, as in JSON."""
    if isinstance(key, str) and key.isdecimal():
        key = int(key)
    return FLOAT if key in (32, FLOAT) else check_pair(key, what)


def read_latencies(path: str | Path) -> dict[str, dict[Bits, float]]:
    """A latency table from a CSV file with the columns layer, weight_bits, activation_bits and latency.

    Raises:
        ValueError: If a column is missing or a value is no number; names file and line.
    """
    table: dict[str, dict[Bits, float]] = {}
    with Path(path).open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                bits = int(row["weight_bits"]), int(row["activation_bits"])
                table.setdefault(row["layer"], {})[bits] = float(row["latency"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected layer, weight_bits, activation_bits and latency, got {row}."
                ) from error
    return table


@torch.no_grad()
def measure_work(network: QuantizedNetwork, calibration: CalibrationSet) -> dict[str, Work]:
    """Work of every quantizable layer, from one batch; layers that do not run, and embeddings, have none.

    Multiply-accumulates are half of what torch's ``FlopCounterMode`` counts while the layer runs.
    """
    names = [*network.layers, *network.floats]
    operations, elements = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    counter = FlopCounterMode(display=False)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            kind = layer_kind(module)
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            real = [leaf for leaf in leaves if leaf.is_floating_point()]
            elements[name] += sum(leaf.numel() for leaf in real[: len(kind.operands) if kind else 1])
            operations[name] -= counter.get_total_flops()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            operations[name] += counter.get_total_flops()

        return hook

    handles = []
    for name in names:
        module = network.model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        with counter:
            calibration.run(0)
    finally:
        for handle in handles:
            handle.remove()
    if idle := [name for name in names if operations[name] == 0 and elements[name] > 0]:
        log.warning("%s: no multiply-accumulates can be counted; they cost no bit operations.", ", ".join(idle))
    samples = batch_size(calibration.batches[0])
    return {name: Work(operations[name] / 2 / samples, elements[name] / samples) for name in names}
