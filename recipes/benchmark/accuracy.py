"""Accuracy of every kind of reconstruction over several seeds: means and standard errors, on several networks."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from lightning_calibtip import (
    AdaQuant,
    BatchNormTuning,
    BiasTuning,
    Calibration,
    Equalization,
    QuantizationModule,
    QuantizationScheme,
)
from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.calibration.logits import float_logits, measure_divergences
from lightning_calibtip.callbacks.stage import Stage
from lightning_calibtip.pipeline.runner import run_stages
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from lightning_calibtip.report.record import write_record

from ..resnet_cifar10.data import CifarData
from ..resnet_cifar10.model import CifarClassifier
from ..resnet_imagenet.data import ImageNetData
from ..resnet_imagenet.model import ImageNetClassifier
from .network import load_bert, validate

NETWORKS = ("resnet20", "resnet56", "efficientnet_lite0", "bert")
BITS = ("W8A8", "W4A8", "W4A4", "W3A4", "W3A3", "W2A4")

# Divergences are measured on so many samples that are neither calibrated nor reported on.
_HELD_APART = 1024


class Kind(NamedTuple):
    """A kind of reconstruction.

    Args:
        rounding: See ``AdaQuantOptions``; ``"none"`` for ranges only.
        granularity: See ``AdaQuantOptions``.
        equalized: Whether inputs are equalized before.
    """

    rounding: str
    granularity: str
    equalized: bool

    def __str__(self) -> str:
        if self.rounding == "none":
            return "equalized ranges" if self.equalized else "ranges"
        return f"{self.rounding}, {self.granularity}s{', equalized' if self.equalized else ''}"


RANGES, DEFAULT = Kind("none", "block", False), Kind("straight_through", "block", True)
KINDS = (
    RANGES,
    RANGES._replace(equalized=True),
    *(
        Kind(*kind)
        for kind in itertools.product(("straight_through", "learned", "feedback"), ("layer", "block"), (False, True))
    ),
)


@dataclass(frozen=True)
class AccuracySubject:
    """A network that is quantized many times.

    Args:
        name: Name of the network.
        metric: What its validation logs.
        trained: The trained network, which is copied before it is quantized.
        data: Calibration and evaluation batches.
        held_apart: Batches that are neither calibrated nor evaluated on; none where the data have no more.
        options: Options of AdaQuant.
    """

    name: str
    metric: str
    trained: pl.LightningModule
    data: pl.LightningDataModule
    held_apart: Sequence[Any] = ()
    options: AdaQuantOptions = AdaQuantOptions()  # noqa: RUF009


def load_subject(name: str, folder: Path) -> AccuracySubject:
    """A network and its data, from a folder with the folders cifar10, imagenet and squad.

    Args:
        name: One of ``NETWORKS``.
        folder: The folder.
    """
    if name == "bert":
        model, train, validation = (
            str(folder / "squad" / each) for each in ("model", "train-sample.json", "xquad-a.json")
        )
        trained, questions = load_bert(model, train, validation)
        return AccuracySubject(name, "f1", trained, questions, (), AdaQuantOptions(iterations=200, batch_size=8))
    if name == "efficientnet_lite0":
        classifier = ImageNetClassifier(name)
        images = ImageNetData(str(folder / "imagenet"), classifier.preprocessing, batch_size=25)
        images.setup("fit")
        return AccuracySubject(name, "top1", classifier, images, (), AdaQuantOptions(iterations=120, batch_size=8))
    cifar = CifarData(str(folder / "cifar10"), 1024)
    rest = CifarData(str(folder / "cifar10"), 1024, split="train")
    for data in (cifar, rest):
        data.setup()
    held_apart, seen = [], 0
    for batch in rest.val_dataloader():
        held_apart.append(batch)
        seen += len(batch[0])
        if seen >= _HELD_APART:
            break
    return AccuracySubject(name, "top1", CifarClassifier(name, folder / "cifar10" / f"{name}.pt"), cifar, held_apart)


def measure_accuracy(
    subject: AccuracySubject, bits: Sequence[str], kinds: Sequence[Kind], seeds: int, path: Path
) -> list[dict[str, Any]]:
    """A row for each bit-width, kind and seed: the metric, and the divergence on samples that are held apart.

    Args:
        subject: The network.
        bits: Bit-widths of weights and activations, ``"W4A4"``.
        kinds: Kinds of reconstruction; ranges, which depend on no seed, are measured once.
        seeds: Number of seeds, from 0 on.
        path: JSON file that gets each row as it is measured; rows that it holds already are not measured again.
    """
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for width, kind, seed in itertools.product(bits, kinds, range(seeds)):
        place = {"network": subject.name, "bits": width, "kind": str(kind), "seed": seed}
        if (kind == RANGES and seed) or any(place.items() <= row.items() for row in rows):
            continue
        rows.append({**place, **_measure(subject, width, kind, seed)})
        print(f"accuracy: {rows[-1]}", flush=True)
        write_record(path, {"rows": rows})
    return rows


def _measure(subject: AccuracySubject, width: str, kind: Kind, seed: int) -> dict[str, Any]:
    pl.seed_everything(seed, verbose=False)
    weight_bits, activation_bits = parse_bits(width)
    scheme = QuantizationScheme(weight_bits=weight_bits, activation_bits=activation_bits)
    module = QuantizationModule(deepcopy(subject.trained), scheme=scheme)
    stages: list[Stage] = [Calibration()]
    if kind.equalized:
        stages.append(Equalization(seed=seed))
    if kind.rounding != "none":
        chosen = replace(subject.options, rounding=kind.rounding, granularity=kind.granularity, seed=seed)
        stages += [BatchNormTuning(), AdaQuant(chosen), BiasTuning(seed=seed)]
    run_stages(module, stages, subject.data.train_dataloader())
    metric = validate(module, subject.data, subject.metric)
    seconds = {stage.name: stage.seconds for stage in stages}
    return {"metric": metric, "divergence": _divergence(module, subject.held_apart), "seconds": seconds}


def _divergence(module: QuantizationModule, batches: Sequence[Any]) -> float | None:
    """Mean KL divergence from the float model, in nats a sample; None without samples."""
    if not batches:
        return None
    held = CalibrationSet(module.calibration.forward, module.calibration.token_mask)
    for batch in batches:
        held.append(batch)
    with torch.no_grad():
        return float(measure_divergences(held, float_logits(module.network, held), range(len(held))).mean())


def parse_bits(width: str) -> tuple[int, int]:
    """Bit-widths of weights and activations.

    Raises:
        ValueError: If it is not written like W4A4.

    Example:
        >>> parse_bits("W4A8")
        (4, 8)
    """
    match = re.fullmatch(r"W(\d+)A(\d+)", width)
    if match is None:
        raise ValueError(f"bits must be written like W4A8, got {width!r}.")
    return int(match[1]), int(match[2])


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds, for each network, bit-width and kind.

    Example:
        >>> place = {"network": "net", "bits": "W4A4", "kind": "ranges"}
        >>> (line,) = summarize([{**place, "metric": m, "divergence": None} for m in (0.5, 0.6)])
        >>> line["metric"], round(line["metric_error"], 3), line["seeds"], line["divergence"]
        (0.55, 0.05, 2, None)
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["bits"], row["kind"]), []).append(row)
    lines = []
    for (network, bits, kind), members in groups.items():
        line: dict[str, Any] = {"network": network, "bits": bits, "kind": kind, "seeds": len(members)}
        for name in ("metric", "divergence"):
            values = [row[name] for row in members if row[name] is not None]
            line[name] = statistics.fmean(values) if values else None
            spread = statistics.stdev(values) if len(values) > 1 else None
            line[f"{name}_error"] = None if spread is None else spread / math.sqrt(len(values))
        lines.append(line)
    return lines


def accuracy_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a Markdown table: means, and standard errors behind them.

    Example:
        >>> line = {"network": "net", "bits": "W4A4", "kind": "ranges", "seeds": 2, "metric": 0.5, "metric_error": 0.01}
        >>> print(accuracy_table([{**line, "divergence": None, "divergence_error": None}]))
        | network | bits | reconstruction | metric | KL | seeds |
        | --- | --- | --- | --- | --- | --- |
        | net | W4A4 | ranges | 0.5000 ± 0.0100 | | 2 |
    """

    def cell(line: Mapping[str, Any], name: str) -> str:
        if line[name] is None:
            return ""
        error = line[f"{name}_error"]
        return f"{line[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")

    head = ["| network | bits | reconstruction | metric | KL | seeds |", "| --- | --- | --- | --- | --- | --- |"]
    cells = [
        [line["network"], line["bits"], line["kind"], cell(line, "metric"), cell(line, "divergence"), line["seeds"]]
        for line in lines
    ]
    return "\n".join([*head, *(re.sub(" +", " ", "| " + " | ".join(map(str, row)) + " |") for row in cells)])
