"""What decisions cost after bit allocation by cost and by KL divergence, at one size."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from lightning_calibtip import BitAllocation, Calibration, QuantizationModule, Utility, run_stages
from lightning_calibtip.calibration.decisions import BY_LABELS, Decisions, Tally
from lightning_calibtip.report.record import write_record
from lightning_calibtip.report.table import text_table

from ..utility.subjects import Subject, load_subject

METHODS = ("float", "kl", "cost")

CANDIDATES, BUDGET, CHECKS = (2, 3, 4), 3, 32


def measure_costs(
    name: str, seeds: int, output: Path, split: str, data: str | None, first_seed: int = 0
) -> list[dict[str, Any]]:
    """Realised cost and accuracy of a subject for each seed: of the float model, and quantized to 3 bits a weight on
    average, with bits chosen by KL divergence and by cost.

    Args:
        name: Name of the subject, see ``recipes.utility``.
        seeds: Number of seeds.
        output: Folder of costs-<name>.json, which is written after each seed.
        split: See ``load_subject``.
        data: See ``load_subject``.
        first_seed: The first seed.

    Returns:
        A row for each seed and method.
    """
    rows: list[dict[str, Any]] = []
    for seed in range(first_seed, first_seed + seeds):
        subject = load_subject(name, seed, split, data)
        of_float = _logits(subject.model.eval(), subject)
        for method in METHODS[1:]:
            found, size = _quantized(subject, method, of_float)
            row = {"subject": name, "seed": seed}
            if method == METHODS[1]:
                rows.append({**row, "method": "float", "cost": found.costs[0], "accuracy": found.accuracy[0]})
            rows.append({**row, "method": method, "cost": found.costs[1], "accuracy": found.accuracy[1], "bytes": size})
            print(rows[-1], flush=True)
        write_record(output / f"costs-{name}.json", {"split": split, "rows": rows})
    return rows


def _quantized(subject: Subject, method: str, of_float: list[Tensor]) -> tuple[Decisions, float]:
    """What decisions cost once bits are chosen by a method, and the bytes of the weights."""
    utility, edge = Utility(subject.matrix), 8 if subject.name == "cifar10" else None
    module = QuantizationModule(subject.model, weight_bits=BUDGET, activation_bits=None, edge_bits=edge)
    metric = utility if method == "cost" else method
    allocation = BitAllocation(metric=metric, candidates=CANDIDATES, weight_bytes=_budget(subject, edge), checks=CHECKS)
    run_stages(module, [Calibration(), allocation], subject.calibration, trainer_options={"accelerator": "cpu"})
    tally = Tally(utility)
    for logits, other, (_, labels) in zip(_logits(module, subject), of_float, subject.evaluation, strict=True):
        tally.add(other, logits, labels)
    found, chosen = tally.decisions(BY_LABELS), allocation.allocation
    assert found is not None and chosen is not None
    return found, chosen.chosen.costs["weight_bytes"]


@torch.no_grad()
def _logits(model: nn.Module, subject: Subject) -> list[Tensor]:
    return [model(x) for x, _ in subject.evaluation]


def _budget(subject: Subject, edge: int | None) -> int:
    """Bytes of 3 bits for each weight, and ``edge`` bits for those of the first and the last layer."""
    counts = [module.weight.numel() for module in subject.model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    at_edges = (counts[0] + counts[-1]) if edge is not None else 0
    bits = BUDGET * (sum(counts) - at_edges) + (edge or 0) * at_edges
    return -(-bits // 8)


def costs_table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with the difference of cost less KL, its standard error and how many of these it is.

    Args:
        rows: From ``measure_costs``.

    Example:
        >>> rows = [dict(subject="digits", seed=s, method=m, cost=c + 0.01 * s, accuracy=0.9, bytes=100)
        ...         for s in range(2) for m, c in (("float", 0.1), ("kl", 0.3), ("cost", 0.2 + 0.01 * s))]
        >>> print(costs_table(rows))
        subject  cost: float     kl  cost  cost less kl  standard error  times  accuracy: float   kl  cost  bytes
        -------  -----------  -----  ----  ------------  --------------  -----  ---------------  ---  ----  --------
        digits         0.105  0.305  0.21        -0.095           0.005    -19              0.9  0.9   0.9  100, 100
    """
    lines = []
    for name in dict.fromkeys(row["subject"] for row in rows):
        of = {method: [row for row in rows if (row["subject"], row["method"]) == (name, method)] for method in METHODS}
        differences = [a["cost"] - b["cost"] for a, b in zip(of["cost"], of["kl"], strict=True)]
        error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
        change = mean(differences)
        costs, accuracy = ([mean(row[key] for row in of[method]) for method in METHODS] for key in ("cost", "accuracy"))
        sizes = ", ".join(f"{mean(row['bytes'] for row in of[method]):.0f}" for method in METHODS[1:])
        ratio = change / error if error else float("nan")
        lines.append([name, *costs, change, error, ratio, *accuracy, sizes])
    columns = ["subject", "cost: float", "kl", "cost", "cost less kl", "standard error", "times", "accuracy: float",
               "kl", "cost", "bytes"]  # fmt: skip
    return text_table(columns, lines)
