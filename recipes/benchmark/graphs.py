"""Graph networks at 8 and at 4 bits: ranges, percentiles, protection of hubs, reconstruction; over several seeds."""

import json
import statistics
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_calibtip import (
    AdaQuant,
    AdaQuantOptions,
    Calibration,
    QuantizationModule,
    QuantizationScheme,
    RangeOptions,
)
from lightning_calibtip.calibration.calibration_set import FirstSamples
from lightning_calibtip.callbacks.stage import Stage
from lightning_calibtip.pipeline.runner import run_stages
from lightning_calibtip.report.record import write_record

NETWORKS = ("gcn", "gat", "gin")

# Features between layers, epochs of training, and how many samples are calibrated on, of each set of graphs.
_SETTINGS = {"digits": (16, 60, 1), "molecules": (64, 12, 512)}


@dataclass(frozen=True)
class GraphKind:
    """One way to quantize a graph network.

    Args:
        name: Name in the table.
        bits: Bit-width of weights and activations, in all layers.
        ranges: How ranges are chosen.
        adaquant: Options of the reconstruction; None for none.

    Example:
        >>> GraphKind("ranges", 4).adaquant is None
        True
    """

    name: str
    bits: int
    ranges: RangeOptions = field(default_factory=RangeOptions)
    adaquant: AdaQuantOptions | None = None


# Degree-Quant takes 0.1 or 0.2.
_HIGH = 0.1

# Chosen on a part of the training data, with two seeds.
KINDS = (
    GraphKind("MSE ranges", 8),
    GraphKind("MSE ranges", 4),
    GraphKind("percentiles", 4, RangeOptions("percentile_by_bits")),
    GraphKind("MSE ranges, protected", 4, RangeOptions(protection_high=_HIGH)),
    GraphKind("AdaQuant", 4, adaquant=AdaQuantOptions(iterations=200)),
    GraphKind(
        "AdaQuant, protected",
        4,
        RangeOptions(protection_high=_HIGH),
        AdaQuantOptions(iterations=200, objective="degree", protection_high=_HIGH),
    ),
)


def measure_graphs(
    data: str, networks: Sequence[str], seeds: int, split: str, path: Path, kinds: Sequence[GraphKind] = KINDS
) -> list[dict[str, Any]]:
    """A row for each network, seed and kind: the metric of the float network, and of the quantized one.

    Args:
        data: ``"digits"`` or ``"molecules"``.
        networks: Kinds of layers.
        seeds: Number of seeds, from 0 on, of which each trains a network of its own.
        split: ``"test"``, or ``"train"`` for a part of the training data.
        path: JSON file that gets each row as it is measured; rows that it holds already are not measured again.
        kinds: Ways to quantize.
    """
    from recipes.graph_network.data import graph_loaders
    from recipes.graph_network.model import train

    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    width, epochs, samples = _SETTINGS[data]
    for name in networks:
        for seed in range(seeds):
            place = {"data": data, "split": split, "network": name, "seed": seed}
            known = [(row["kind"], row["bits"]) for row in rows if place.items() <= row.items()]
            missing = [kind for kind in kinds if (kind.name, kind.bits) not in known]
            if not missing:
                continue
            loaders = graph_loaders(data, split, seed)  # type: ignore[arg-type]
            trained = train(name, loaders, epochs, seed, "cpu", width=width)
            batches = list(FirstSamples(loaders.train, samples))
            for kind in missing:
                pl.seed_everything(seed, verbose=False)
                found = _measure(trained, batches, loaders, kind)
                rows.append({**place, "kind": kind.name, "bits": kind.bits, **found})
                print(f"graphs: {rows[-1]}", flush=True)
                write_record(path, {"rows": rows})
    return rows


def _measure(trained: Any, batches: list[Any], loaders: Any, kind: GraphKind) -> dict[str, Any]:
    scheme = QuantizationScheme(weight_bits=kind.bits, activation_bits=kind.bits, edge_bits=None)
    module = QuantizationModule(deepcopy(trained), scheme)
    stages: list[Stage] = [Calibration(kind.ranges)]
    if kind.adaquant is not None:
        stages.append(AdaQuant(kind.adaquant))
    run = run_stages(module, stages, batches, loaders.validation, {"accelerator": "cpu"})
    name = trained.metric_name
    products = sorted(module.network.plan.float_matmuls)
    return {"float": run.float_metrics[name], "metric": run.metrics[name], "float_products": products}


def graph_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds as a Markdown table, with standard errors, and the share of the loss that is won back of
    what ranges alone lose at the same bits.

    Example:
        >>> row = {"data": "digits", "split": "test", "network": "gcn", "bits": 4, "float": 0.95}
        >>> ranges = [{**row, "kind": "MSE ranges", "seed": seed, "metric": 0.85} for seed in (0, 1)]
        >>> better = [{**row, "kind": "AdaQuant", "seed": seed, "metric": 0.92} for seed in (0, 1)]
        >>> print(graph_table([*ranges, *better]).splitlines()[-1])
        | gcn, digits | W4A4 | AdaQuant | 0.9500 | 0.9200 ± 0.0000 | 0.70 |
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((f"{row['network']}, {row['data']}", row["bits"], row["kind"]), []).append(row)
    lines = ["| network | bits | how | float | quantized | share won back |", "| --- | --- | --- | --- | --- | --- |"]
    for (network, bits, kind), members in groups.items():
        reference, metric = (statistics.fmean(row[name] for row in members) for name in ("float", "metric"))
        spread = statistics.stdev(row["metric"] for row in members) if len(members) > 1 else 0.0
        plain = groups.get((network, bits, "MSE ranges"))
        lost = None if plain is None else reference - statistics.fmean(row["metric"] for row in plain)
        share = "" if not lost or plain is members else f"{(metric - reference + lost) / lost:.2f}"
        quantized = f"{metric:.4f} ± {spread / len(members) ** 0.5:.4f}"
        lines.append(f"| {network} | W{bits}A{bits} | {kind} | {reference:.4f} | {quantized} | {share} |")
    return "\n".join(lines)
