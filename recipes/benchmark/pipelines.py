"""Top-1 or F1, size and seconds of every pipeline at every scheme, on ResNet-20 and on a question answering BERT."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_calibtip import PipelineOptions, QuantizationScheme, quantize
from lightning_calibtip.report.record import write_record
from lightning_calibtip.report.size import model_size

from ..resnet_cifar10.data import CifarData
from ..resnet_cifar10.model import CifarClassifier
from .network import load_bert, validate

PIPELINES = ("calibrate", "light", "advanced", "sequential", "mixed")

# A scheme, and the bit-widths that the integer program chooses from where the pipeline allocates.
SCHEMES: dict[str, tuple[QuantizationScheme, list[tuple[int, int | None]]]] = {
    "W8A8": (QuantizationScheme(weight_bits=8, activation_bits=8), [(4, 8), (8, 8)]),
    "W4A8": (QuantizationScheme(weight_bits=4, activation_bits=8), [(4, 8), (8, 8)]),
    "W4 in groups of 32": (
        QuantizationScheme(weight_bits=4, activation_bits=None, group_size=32),
        [(4, None), (8, None)],
    ),
}


@dataclass(frozen=True)
class Subject:
    """A network to be quantized many times.

    Args:
        name: Name of the network.
        metric: What its validation logs.
        trained: The trained network, which is copied before it is quantized.
        data: Calibration and evaluation batches.
        options: Options of the stages.
        compression: Budget of the weights over the float weights, by scheme.
    """

    name: str
    metric: str
    trained: pl.LightningModule
    data: pl.LightningDataModule
    options: PipelineOptions
    compression: Mapping[str, float]


def resnet20(checkpoint: Path, data: str) -> Subject:
    """ResNet-20 on CIFAR-10, with 1,024 calibration images and the default options."""
    images = CifarData(data, 1024)
    images.setup()
    budgets = {"W8A8": 0.25, "W4A8": 0.13, "W4 in groups of 32": 0.13}
    trained = CifarClassifier("resnet20", checkpoint)
    return Subject("resnet20", "top1", trained, images, PipelineOptions(seed=0), budgets)


def bert(model: str, train: str, validation: str) -> Subject:
    """A BERT on SQuAD in windows of 256 tokens, with 64 calibration windows and 40 steps of 8 windows a unit."""
    trained, questions = load_bert(model, train, validation)
    options = PipelineOptions.of(
        {
            "adaquant": {"iterations": 40, "batch_size": 8},
            "preparation": {"iterations": 20, "batch_size": 8},
            "allocation": {"samples": 16, "checks": 2},
            "bias_tuning": {"epochs": 1},
            "seed": 0,
        }
    )
    # The embeddings, half of such a small network, are an edge and stay at 8 bits.
    budgets = {"W8A8": 0.25, "W4A8": 0.2, "W4 in groups of 32": 0.2}
    return Subject("bert", "f1", trained, questions, options, budgets)


def measure_pipelines(subject: Subject, path: Path) -> list[dict[str, Any]]:
    """A row for the float network and for each scheme and pipeline: metric, size over the float size, seconds.

    Args:
        subject: The network.
        path: JSON file that gets each row as it is measured; rows that it holds already are not measured again.
    """
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for scheme_name, pipeline in [("float", "none"), *((scheme, each) for scheme in SCHEMES for each in PIPELINES)]:
        place = {"network": subject.name, "scheme": scheme_name, "pipeline": pipeline}
        if any(place.items() <= row.items() for row in rows):
            continue
        rows.append({**place, **_measure(subject, scheme_name, pipeline)})
        print(f"pipelines: {rows[-1]}", flush=True)
        write_record(path, {"rows": rows})
    return rows


def _measure(subject: Subject, scheme_name: str, pipeline: str) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module: pl.LightningModule = subject.trained
    size, seconds = 1.0, 0.0
    if scheme_name != "float":
        scheme, candidates = SCHEMES[scheme_name]
        compression = subject.compression[scheme_name]
        allocation = replace(subject.options.allocation, candidates=candidates, compression=compression)
        options = replace(subject.options, allocation=allocation)
        trainer_options = {"accelerator": "cpu"}
        loader = subject.data.train_dataloader()
        run = quantize(module, loader, None, pipeline, options, trainer_options=trainer_options, scheme=scheme)
        module, size = run.module, model_size(run.module.network).ratio
        seconds = sum(stage.seconds for stage in run.stages)
    return {"metric": validate(module, subject.data, subject.metric), "size": size, "seconds": seconds}
