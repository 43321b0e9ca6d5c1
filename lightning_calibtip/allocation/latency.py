"""Latencies that the user has measured, from a mapping or a CSV file."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..network.network import QuantizedNetwork
from ..quantization.spec import FLOAT_BITS, BitWidths

LatencyTable = Mapping[str, Mapping[Any, float]]

_FLOAT = BitWidths(None, None)


def latencies(
    table: LatencyTable, network: QuantizedNetwork, options: Mapping[str, Sequence[BitWidths]]
) -> dict[str, dict[BitWidths, float]]:
    """Look up the latency of each layer at each of its bit-widths.

    Args:
        table: Layer -> bit-width, or pair ``(weight_bits, activation_bits)`` -> latency, in any unit. One number stands
            for whatever the scheme quantizes; None or 32 stands for float. Bit-widths that make no difference to a
            layer (those of the weight of a matrix product, say) need not be listed apart. Layers that stay in float
            may be missing and then count nothing.
        network: Network that has been prepared.
        options: Bit-widths that each quantizable layer may have.

    Raises:
        ValueError: If the table names an unknown layer, or lacks a quantized layer or one of its bit-widths.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
        >>> network = QuantizedNetwork(model, QuantizationScheme())
        >>> network.prepare(lambda: model(torch.ones(1, 2)))
        >>> latencies({"0": {8: 1.5, (4, None): 2.5}}, network, {"0": [BitWidths(4, None)]})
        {'0': {BitWidths(weight=4, activation=None): 2.5}}
    """
    if unknown := [name for name in table if name not in options]:
        raise ValueError(
            f"latency_table: {', '.join(map(repr, unknown))} is no quantizable layer; these are: {', '.join(options)}."
        )
    costs: dict[str, dict[BitWidths, float]] = {}
    for name, of_layer in options.items():
        what = f"latency_table[{name!r}]"
        given = {_bit_widths(key, what, network): float(value) for key, value in table.get(name, {}).items()}
        if list(of_layer) == [_FLOAT] and name not in table:
            given[_FLOAT] = 0.0
        effective = {_effective(network, name, bits): value for bits, value in given.items()}
        known = {bits: given.get(bits, effective.get(_effective(network, name, bits))) for bits in of_layer}
        if missing := [bits.label for bits, value in known.items() if value is None]:
            raise ValueError(f"latency_table lacks {name!r} at {', '.join(missing)}.")
        costs[name] = {bits: value for bits, value in known.items() if value is not None}
    return costs


def _bit_widths(key: Any, what: str, network: QuantizedNetwork) -> BitWidths:
    """A key of a latency table as bit-widths; one number may be given as text, as in JSON."""
    if isinstance(key, str) and key.isdecimal():
        key = int(key)
    if isinstance(key, BitWidths):
        key = (key.weight, key.activation)
    if isinstance(key, tuple):
        key = tuple(None if bits == FLOAT_BITS else bits for bits in key)
    return _FLOAT if key in (None, FLOAT_BITS, (None, None)) else network.scheme.bit_widths(key, what)


def _effective(network: QuantizedNetwork, name: str, bits: BitWidths) -> BitWidths:
    """Bit-widths of the tensors that a layer really has."""
    return network.config_for(name, bits).bit_widths if name in network.layers else bits


def read_latencies(path: str | Path) -> dict[str, dict[BitWidths, float]]:
    r"""Read a latency table from a CSV file with the columns layer, weight_bits, activation_bits and latency.

    Args:
        path: CSV file; an empty cell, or 32, in a column of bits stands for float.

    Raises:
        ValueError: If a column is missing or a value is no number; the message names file and line.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "latency.csv")
        ...     _ = path.write_text("layer,weight_bits,activation_bits,latency\nconv1,4,,2.5\n")
        ...     read_latencies(path)
        {'conv1': {BitWidths(weight=4, activation=None): 2.5}}
    """
    table: dict[str, dict[BitWidths, float]] = {}
    with Path(path).open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                bits = BitWidths(_cell(row["weight_bits"]), _cell(row["activation_bits"]))
                table.setdefault(row["layer"], {})[bits] = float(row["latency"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected layer, weight_bits, activation_bits and latency, got {row}."
                ) from error
    return table


def _cell(text: str) -> int | None:
    bits = int(text) if text else FLOAT_BITS
    return None if bits == FLOAT_BITS else bits
