"""Measurements: ``python -m recipes.benchmark --help`` lists them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from lightning_calibtip import QuantizationScheme
from lightning_calibtip.pipeline.presets import PipelineName
from lightning_calibtip.report.record import write_record
from recipes.output import set_up_logging
from recipes.utility.subjects import SUBJECTS as SUBJECTS_OF_COSTS

from .accuracy import BITS, KINDS, NETWORKS, accuracy_table, load_subject, measure_accuracy, parse_bits, summarize
from .allocation import measure_correlation, measure_replay, measure_solver
from .costs import costs_table, measure_costs
from .diagnosis import SUBJECTS as DIAGNOSED
from .diagnosis import diagnosis_table, measure_diagnosis
from .figure import accuracy_figure, benchmark_figure, inference_figure
from .graphs import NETWORKS as GRAPH_NETWORKS
from .graphs import graph_table, measure_graphs
from .growth import measure_growth
from .inference import SUBJECTS, measure_inference
from .memory import measure_memory
from .pipelines import bert, measure_pipelines, resnet20
from .samples import measure_price, measure_samples
from .scale import measure_scale, scale_table
from .stages import measure_stages
from .step import measure_step

PARTS = ("growth", "step", "stages", "memory", "samples", "price")
ALLOCATION_PARTS = ("solver", "sensitivity", "correlation")
_NEED_DATA = ("samples", "price", "correlation")


def accuracy(
    data: Path,
    output: Path = Path("runs/bench"),
    networks: str | None = None,
    bits: str | None = None,
    kinds: str | None = None,
    seeds: int = 5,
) -> None:
    """Measure every kind of sequential reconstruction over several seeds, and print means and standard errors.

    Writes accuracy.json and accuracy.png. Rows that the file holds already are kept: a run that was killed goes on.

    Args:
        data: Folder with the folders cifar10 (with resnet20.pt and resnet56.pt), imagenet and squad (with model/), as
            the recipes take them.
        output: Folder for the results.
        networks: Networks to measure, separated by commas: resnet20, resnet56, efficientnet_lite0, bert; all if not
            given.
        bits: Bit-widths, separated by commas: W8A8,W4A8,W4A4,W3A4,W3A3,W2A4 if not given.
        kinds: Kinds of reconstruction, separated by semicolons, as the table names them ("ranges;straight_through,
            blocks, equalized"); all if not given.
        seeds: Number of seeds.

    Raises:
        ValueError: If a network, a bit-width or a kind is unknown.
    """
    set_up_logging("ERROR")
    widths = BITS if bits is None else tuple(bits.split(","))
    for width in widths:
        parse_bits(width)
    by_name = {str(kind): kind for kind in KINDS}
    names = tuple(by_name) if kinds is None else tuple(name.strip() for name in kinds.split(";"))
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"kinds must be of {'; '.join(by_name)}, got {'; '.join(unknown)!r}.")
    rows: list[dict[str, Any]] = []
    for network in _chosen_parts(networks, NETWORKS, "networks"):
        subject = load_subject(network, data)
        rows = measure_accuracy(subject, widths, [by_name[name] for name in names], seeds, output / "accuracy.json")
    lines = summarize(rows)
    print(accuracy_table(lines))
    accuracy_figure(lines).savefig(output / "accuracy.png", dpi=150)
    print(f"written to {output}")


def reconstruction(
    output: Path = Path("runs/bench"),
    only: str | None = None,
    data: str | None = None,
    checkpoint: Path | None = None,
    split: Literal["test", "train"] = "test",
    fine_tuning_rate: float = 1e-5,
    iterations: int = 100,
) -> None:
    """Measure AdaQuant's growth with depth, its step, the share of each stage, its memory and its price.

    Writes benchmark.json and benchmark.png. Parts that are not measured are empty in the file.

    Args:
        output: Folder for the results.
        only: Parts to measure, separated by commas: growth, step, stages, memory, samples, price; all if not given.
        data: The hub's cifar10 or a folder, as in recipes.resnet_cifar10; $CALIBTIP_TEST_DATA/cifar10 if not given and
            that variable is set.
        checkpoint: Trained ResNet-20; resnet20.pt in the data folder if not given.
        split: Evaluate on the test images, or on the training images that are not calibrated on (to choose settings).
        fine_tuning_rate: Learning rate of the fine-tuning that AdaQuant is compared with.
        iterations: Steps of AdaQuant for each unit where growth is measured.

    Raises:
        ValueError: If a part is unknown, or there is no data or checkpoint for it.
    """
    set_up_logging("ERROR")
    parts = _chosen_parts(only, PARTS)
    data, checkpoint = _find_data(parts, PARTS, data, checkpoint)
    results: dict[str, Any] = {part: {} if part == "price" else [] for part in PARTS}
    for part in parts:
        if part == "growth":
            results[part] = measure_growth(iterations)
        elif part == "step":
            results[part] = measure_step()
        elif part == "stages":
            results[part] = measure_stages()
        elif part == "memory":
            results[part] = measure_memory()
        else:
            assert data is not None and checkpoint is not None
            if part == "samples":
                results[part] = measure_samples(checkpoint, data, split, fine_tuning_rate)
            else:
                results[part] = measure_price(checkpoint, data)
        # After each part: a long run that is broken off leaves what it has measured.
        write_record(output / "benchmark.json", results)
    if set(parts) - {"price"}:
        benchmark_figure(results).savefig(output / "benchmark.png", dpi=150)
    print(f"written to {output}")


def allocation(
    output: Path = Path("runs/bench"),
    only: str | None = None,
    data: str | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Measure bit allocation: seconds of the integer program, of the sensitivities, and how well losses are predicted.

    Writes allocation.json. Parts that are not measured are empty in the file.

    Args:
        output: Folder for the results.
        only: Parts to measure, separated by commas: solver, sensitivity, correlation; all if not given.
        data: As for reconstruction; only its training images are used.
        checkpoint: As for reconstruction.

    Raises:
        ValueError: If a part is unknown, or there is no data or checkpoint for it.
    """
    set_up_logging("ERROR")
    parts = _chosen_parts(only, ALLOCATION_PARTS)
    data, checkpoint = _find_data(parts, ALLOCATION_PARTS, data, checkpoint)
    results: dict[str, Any] = {"solver": [], "sensitivity": {}, "correlation": {}}
    for part in parts:
        if part == "solver":
            results[part] = measure_solver()
        elif part == "sensitivity":
            results[part] = measure_replay()
        else:
            assert data is not None and checkpoint is not None
            results[part] = measure_correlation(checkpoint, data)
        write_record(output / "allocation.json", results)
    print(f"written to {output}")


def pipelines(
    data: str,
    checkpoint: Path,
    output: Path = Path("runs/bench"),
    validation: str | None = None,
) -> None:
    """Measure what every pipeline makes of W8A8, W4A8 and weights alone at 4 bits in groups of 32.

    Writes pipelines-resnet20.json or, where validation questions are given, pipelines-bert.json. Rows that the file
    holds already are kept: a run that was killed goes on.

    Args:
        data: The hub's cifar10 or a folder, as in recipes.resnet_cifar10; for a BERT, training questions as in
            recipes.bert_squad.
        checkpoint: Trained ResNet-20; for a BERT, its folder or name on the hub.
        output: Folder for the results.
        validation: Questions to evaluate a BERT on.
    """
    set_up_logging("ERROR")
    subject = resnet20(checkpoint, data) if validation is None else bert(str(checkpoint), data, validation)
    path = output / f"pipelines-{subject.name}.json"
    measure_pipelines(subject, path)
    print(f"written to {path}")


def inference(
    data: Path,
    output: Path = Path("runs/bench"),
    only: str | None = None,
    pipeline: PipelineName = "sequential",
    weight_bits: int = 8,
    accuracy: bool = True,
    integer: bool = False,
) -> None:
    """Measure exported networks in ONNX Runtime and OpenVINO, beside float, quantize_static and NNCF.

    One process on one thread, the contenders in turns; ratios are float ONNX Runtime's median seconds over theirs.
    Writes inference.json, inference.png and the ONNX files.

    Args:
        data: Folder with the folders cifar10 (with resnet20.pt), imagenet and squad (with model/), as the recipes take
            them.
        output: Folder for the results.
        only: Networks to measure, separated by commas: resnet20, efficientnet_lite0, bert; all if not given.
        pipeline: Pipeline that quantizes them.
        weight_bits: Bit-width of the weights; activations have 8 bits.
        accuracy: Whether every file is evaluated, too.
        integer: Whether convolutional networks are also run in integers alone, and their decisions counted.

    Raises:
        ValueError: If a network is unknown.
    """
    set_up_logging("ERROR")
    torch.set_num_threads(1)
    scheme = QuantizationScheme(weight_bits=weight_bits, target="onnxruntime")
    rows: list[dict[str, Any]] = []
    for name in _chosen_parts(only, tuple(SUBJECTS)):
        folder, make = SUBJECTS[name]
        measure_inference(make(data / folder, scheme), pipeline, output, rows, accuracy, integer and name != "bert")
    inference_figure(rows).savefig(output / "inference.png", dpi=150)
    print(f"written to {output}")


def scale(output: Path = Path("runs/bench"), steps: int = 60) -> None:
    """Measure the time of each stage at three sizes, in float passes, beside the laws of docs/scale.md.

    Writes scale.json.

    Args:
        output: Folder for the results.
        steps: Optimiser steps of AdaQuant for each unit.
    """
    set_up_logging("ERROR")
    torch.set_num_threads(1)
    rows = measure_scale(steps)
    print(scale_table(rows))
    write_record(output / "scale.json", {"rows": rows})
    print(f"written to {output}")


def diagnosis(
    data: Path, output: Path = Path("runs/bench"), only: str | None = None, max_degradation: float = 0.01
) -> None:
    """Measure what a diagnosis is worth: its three worst layers at 8 bits, its remedies applied, and its time.

    Writes diagnosis.json.

    Args:
        data: Folder with the folders cifar10, imagenet and squad, as for accuracy.
        output: Folder for the results.
        only: Networks to measure, separated by commas: resnet20 (at W4A4), efficientnet_lite0 (W4A8), bert (W8A4); all
            if not given.
        max_degradation: Greatest difference from the float metric at which no further remedy is applied.

    Raises:
        ValueError: If a network is unknown.
    """
    set_up_logging("ERROR")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in _chosen_parts(only, tuple(DIAGNOSED)):
        rows.append(measure_diagnosis(load_subject(name, data), DIAGNOSED[name], max_degradation))
        write_record(output / "diagnosis.json", {"rows": rows})
    print(diagnosis_table(rows))
    print(f"written to {output}")


def _chosen_parts(only: str | None, parts: Sequence[str], option: str = "only") -> Sequence[str]:
    chosen = parts if only is None else tuple(only.split(","))
    if unknown := [part for part in chosen if part not in parts]:
        raise ValueError(f"{option} must name parts of {', '.join(parts)}, got {', '.join(unknown)!r}.")
    return chosen


def _find_data(
    chosen: Sequence[str], parts: Sequence[str], data: str | None, checkpoint: Path | None
) -> tuple[str | None, Path | None]:
    """Data and checkpoint, from the test data's folder where they are not given."""
    if data is None and "CALIBTIP_TEST_DATA" in os.environ:
        data = str(Path(os.environ["CALIBTIP_TEST_DATA"]) / "cifar10")
    if checkpoint is None and data is not None and (Path(data) / "resnet20.pt").exists():
        checkpoint = Path(data) / "resnet20.pt"
    if any(part in _NEED_DATA for part in chosen) and (data is None or checkpoint is None):
        raise ValueError(
            f"{', '.join(part for part in chosen if part in _NEED_DATA)} need --data and --checkpoint (a trained "
            f"ResNet-20); --only {','.join(part for part in parts if part not in _NEED_DATA)} needs none."
        )
    return data, checkpoint


def graphs(
    data: Literal["digits", "molecules"] = "digits",
    output: Path = Path("runs/bench"),
    networks: str | None = None,
    seeds: int = 5,
    split: Literal["test", "train"] = "test",
) -> None:
    """Train graph networks, quantize each in several ways, and print a table of means over the seeds.

    Writes graphs.json. Rows that the file holds already are kept: a run that was killed goes on.

    Args:
        data: Digits, one graph whose nodes are classified, or molecules, whose logP is predicted.
        output: Folder for the results.
        networks: Networks to measure, separated by commas: gcn, gat, gin; all if not given.
        seeds: Number of seeds.
        split: Evaluate on the test data, or on training data that are not trained on (to choose settings).

    Raises:
        ValueError: If a network is unknown.
    """
    set_up_logging("ERROR")
    chosen = _chosen_parts(networks, GRAPH_NETWORKS, "networks")
    rows = measure_graphs(data, chosen, seeds, split, output / "graphs.json")
    print(graph_table([row for row in rows if row["data"] == data and row["split"] == split]))
    print(f"written to {output}")


def costs(
    data: Path | None = None,
    output: Path = Path("runs/bench"),
    subjects: str | None = None,
    seeds: int = 5,
    first_seed: int = 0,
    split: Literal["test", "train"] = "test",
) -> None:
    """Measure what decisions cost after bit allocation by cost and by KL divergence at 3 bits a weight, and print means
    and paired standard errors.

    Writes costs-<subject>.json after each seed.

    Args:
        data: For cifar10, a folder with train*.parquet, test*.parquet and resnet20.pt.
        output: Folder for the results.
        subjects: What to measure, separated by commas: cancer, digits, cifar10; all if not given, without cifar10 where
            there is no data.
        seeds: Number of seeds.
        first_seed: The first seed.
        split: Evaluate on the test samples, or on training samples that are kept apart (to choose settings).

    Raises:
        ValueError: If a subject is unknown, or cifar10 has no data.
    """
    set_up_logging("ERROR")
    known = SUBJECTS_OF_COSTS if data is not None or subjects is not None else SUBJECTS_OF_COSTS[:-1]
    rows: list[dict[str, Any]] = []
    for name in _chosen_parts(subjects, known, "subjects"):
        rows += measure_costs(name, seeds, output, split, None if data is None else str(data), first_seed)
    print(costs_table(rows))
    print(f"written to {output}")


COMMANDS: dict[str, Any] = {
    "accuracy": accuracy,
    "reconstruction": reconstruction,
    "allocation": allocation,
    "pipelines": pipelines,
    "inference": inference,
    "scale": scale,
    "diagnosis": diagnosis,
    "graphs": graphs,
    "costs": costs,
}

if __name__ == "__main__":
    auto_cli(COMMANDS, as_positional=False)
