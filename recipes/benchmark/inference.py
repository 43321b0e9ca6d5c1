"""Latency, size and accuracy of exported networks beside float, ONNX Runtime's own quantization, OpenVINO and NNCF."""

import copy
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_calibtip import PipelineOptions, QuantizationScheme, export_onnx, quantize
from lightning_calibtip.export.integer import IntegerNetwork
from lightning_calibtip.pipeline.presets import PipelineName
from lightning_calibtip.report.record import write_record

from ..resnet_cifar10.data import CifarData
from ..resnet_cifar10.model import CifarClassifier
from ..resnet_imagenet.data import ImageNetData
from ..resnet_imagenet.model import ImageNetClassifier
from .engines import (
    Contender,
    EngineNet,
    export_float,
    onnxruntime_contender,
    openvino_contender,
    quantize_nncf,
    quantize_static,
)
from .network import load_bert, validate

_ROUNDS = 30


@dataclass(frozen=True)
class Subject:
    """A network whose inference is measured.

    Args:
        name: Name of the network.
        metric: What its validation logs.
        trained: The trained module, whose network is its ``net``.
        data: Calibration and evaluation batches.
        inputs_of: Names and tensors of the network's inputs in a batch.
        outputs: Names of the outputs that the module asks for, see ``EngineNet``.
        batch_sizes: Numbers of samples that are timed.
        options: Options of the pipeline's stages.
        scheme: Bit-widths.
    """

    name: str
    metric: str
    trained: pl.LightningModule
    data: pl.LightningDataModule
    inputs_of: Callable[[Any], dict[str, Tensor]]
    outputs: tuple[str, ...] | None
    batch_sizes: tuple[int, int]
    options: PipelineOptions
    scheme: QuantizationScheme


def resnet20_subject(data: Path, scheme: QuantizationScheme) -> Subject:
    """ResNet-20 on CIFAR-10, calibrated on 1,024 images."""
    images = CifarData(str(data), 1024, batch_size=32)
    images.setup()
    trained = CifarClassifier("resnet20", data / "resnet20.pt")
    options = PipelineOptions(seed=0)
    return Subject("resnet20", "top1", trained, images, lambda b: {"x": b[0]}, None, (1, 32), options, scheme)


def efficientnet_subject(data: Path, scheme: QuantizationScheme) -> Subject:
    """EfficientNet-Lite0 on ImageNet, calibrated on all training images of the folder."""
    trained = ImageNetClassifier("efficientnet_lite0")
    images = ImageNetData(str(data), trained.preprocessing, batch_size=32)
    images.setup("fit")
    # As in few_images.yaml of its recipe.
    options = PipelineOptions.of({"seed": 0, "adaquant": {"iterations": 120, "batch_size": 8}})
    return Subject("efficientnet_lite0", "top1", trained, images, lambda b: {"x": b[0]}, None, (1, 32), options, scheme)


def bert_subject(data: Path, scheme: QuantizationScheme) -> Subject:
    """A BERT on SQuAD in windows of 256 tokens, calibrated on 64 of them."""
    model, train, validation = (str(data / name) for name in ("model", "train-sample.json", "xquad-a.json"))
    trained, questions = load_bert(model, train, validation, batch_size=8)
    names = ("input_ids", "attention_mask", "token_type_ids")
    options = PipelineOptions.of({"seed": 0, "adaquant": {"iterations": 40, "batch_size": 8}})

    def inputs_of(batch: Any) -> dict[str, Tensor]:
        return {name: batch[name] for name in names if name in batch}

    outputs = ("start_logits", "end_logits")
    return Subject("bert", "f1", trained, questions, inputs_of, outputs, (1, 8), options, scheme)


SUBJECTS: dict[str, tuple[str, Callable[[Path, QuantizationScheme], Subject]]] = {
    "resnet20": ("cifar10", resnet20_subject),
    "efficientnet_lite0": ("imagenet", efficientnet_subject),
    "bert": ("squad", bert_subject),
}


def _bits(scheme: QuantizationScheme, pipeline: PipelineName) -> str:
    allocates = pipeline in ("light", "advanced", "mixed")
    return "mixed" if allocates else f"W{scheme.weight_bits}A{scheme.activation_bits}"


def measure_inference(
    subject: Subject,
    pipeline: PipelineName,
    folder: Path,
    results: list[dict[str, Any]],
    accuracy: bool,
    integer: bool = False,
) -> dict[str, Any]:
    """Ratios of latency to float in ONNX Runtime, sizes, accuracies, operators and agreement of one network.

    Args:
        subject: The network.
        pipeline: Pipeline that quantizes it, for the target ``onnxruntime``.
        folder: Folder for the files.
        results: Results of earlier networks; this one is added.
        accuracy: Whether all contenders are evaluated, too.
        integer: Whether the network is run in integers alone, too, and its decisions are counted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calibration = list(subject.data.train_dataloader())
    module = quantize(
        subject.trained, calibration, None, pipeline, subject.options, trainer_options={"accelerator": "cpu"},
        scheme=subject.scheme,
    ).module  # fmt: skip
    report = export_onnx(module, folder / f"{subject.name}.onnx", calibration[0])
    example = subject.inputs_of(calibration[0])
    names = list(example)
    floats = folder / f"{subject.name}.float.onnx"
    export_float(copy.deepcopy(subject.trained), example, floats)
    feeds = [{name: value.numpy() for name, value in subject.inputs_of(batch).items()} for batch in calibration]
    static = folder / f"{subject.name}.static.onnx"
    quantize_static(floats, feeds[:8], static)
    contenders = [
        onnxruntime_contender("float", floats),
        onnxruntime_contender("ours", report.path),
        onnxruntime_contender("quantize_static", static),
    ]
    if find_spec("openvino"):
        contenders.append(openvino_contender("ours in OpenVINO", report.path))
        if find_spec("nncf"):
            transformer = subject.name == "bert"
            contenders.append(openvino_contender("NNCF in OpenVINO", quantize_nncf(floats, feeds[:8], transformer)))
    row: dict[str, Any] = {
        "network": subject.name,
        "pipeline": pipeline,
        "bits": _bits(subject.scheme, pipeline),
        "processor": processor(),
        "operators": report.counts,
        "bytes": {contender.name: contender.file_bytes for contender in contenders},
        "seconds": {},
        "ratio": {},
    }
    for size in subject.batch_sizes:
        batch = {name: value[:size] for name, value in feeds[0].items()}
        seconds = alternate(contenders, batch)
        row["seconds"][size] = seconds
        row["ratio"][size] = {name: seconds["float"] / value for name, value in seconds.items()}
    results.append(row)
    print(f"inference: {row}", flush=True)
    if accuracy:
        row["torch"] = validate(module, subject.data, subject.metric)
        row["metrics"] = {each.name: _validate_engine(each, subject, names) for each in contenders}
        row["agreement"] = _agreement(contenders[1], module, subject)
        print(f"inference: {subject.name} {row['torch']:.4f} {row['metrics']} {row['agreement']:.4f}", flush=True)
    if integer:
        batches = [subject.inputs_of(batch) for batch in subject.data.val_dataloader()]
        row["integer_agreement"] = IntegerNetwork(report.path).agreement(module, batches)
        print(f"inference: {subject.name} in integers alone {row['integer_agreement']:.4f}", flush=True)
    write_record(folder / "inference.json", {"rows": results})
    return row


def alternate(contenders: list[Contender], batch: Mapping[str, Any]) -> dict[str, float]:
    """Median seconds of each contender on a batch, measured in turns."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for round_ in range(_ROUNDS + 3):
        for contender in contenders:
            started = time.perf_counter()
            contender.run(batch)
            if round_ >= 3:
                seconds[contender.name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def processor() -> str:
    """Name of the processor, and whether it multiplies bytes in one instruction (VNNI)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    has_vnni = any(flag in found.get("flags", "").split() for flag in ("avx512_vnni", "avx_vnni"))
    return f"{found.get('model name', platform.machine())}, {'with' if has_vnni else 'without'} VNNI"


def _validate_engine(contender: Contender, subject: Subject, inputs: list[str]) -> float:
    module = copy.deepcopy(subject.trained)
    module.net = EngineNet(contender, inputs, subject.outputs)
    return validate(module, subject.data, subject.metric)


@torch.no_grad()
def _agreement(contender: Contender, module: Any, subject: Subject) -> float:
    """Share of decisions of a contender that are those of the fake-quantized module."""
    same = total = 0
    for batch in subject.data.val_dataloader():
        inputs = subject.inputs_of(batch)
        outputs = module.model(**inputs)
        wanted = (
            [outputs] if isinstance(outputs, Tensor) else [getattr(outputs, name) for name in subject.outputs or ()]
        )
        given = contender.run({name: value.numpy() for name, value in inputs.items()})
        for reference, output in zip(wanted, given, strict=True):
            equal = torch.from_numpy(output).argmax(-1) == reference.argmax(-1)
            same, total = same + int(equal.sum()), total + equal.numel()
    return same / total
