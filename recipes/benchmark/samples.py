"""Accuracy on few images, beside plain fine-tuning on as few, and the price of reconstruction."""

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_calibtip import AdaQuant, BatchNormTuning, Calibration, QuantizationModule
from lightning_calibtip.network.trainable import trainable
from lightning_calibtip.pipeline.runner import run_stages

from ..resnet_cifar10.data import CifarData
from ..resnet_cifar10.model import CifarClassifier
from .network import validate

SAMPLES = (16, 64, 256, 1024)
_FINE_TUNING_STEPS, _BATCH = 500, 32


def measure_samples(checkpoint: Path, data: str, split: str, fine_tuning_rate: float) -> list[dict[str, Any]]:
    """A row for each number of calibration images and method: top-1 at W4A4 after sequential AdaQuant, and after
    fine-tuning the same quantized model end to end on the same images and their labels, in as many steps as AdaQuant
    takes a unit."""
    rows = []
    for samples in SAMPLES:
        images = _images(data, samples, split)
        for method in ("AdaQuant", "fine-tuning"):
            module = _calibrated(checkpoint, images, 4, 4)
            if method == "AdaQuant":
                run_stages(module, [AdaQuant()], images.train_dataloader())
            else:
                inputs, labels = images.calibration.tensors
                fine_tune(module, inputs, labels, fine_tuning_rate)
            rows.append({"method": method, "samples": samples, "top1": _top1(module, images)})
            print(f"samples: {rows[-1]}", flush=True)
    return rows


def measure_price(checkpoint: Path, data: str) -> dict[str, Any]:
    """Seconds of sequential W4A4 AdaQuant on 1,024 images over those of a float training epoch of 50,000 images in
    batches of 128, of which 100 steps are measured."""
    images = _images(data, 1024, "train")
    module = _calibrated(checkpoint, images, 4, 4)
    stage = AdaQuant()
    run_stages(module, [stage], images.train_dataloader())
    net = CifarClassifier("resnet20").net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = images.calibration.tensors
    inputs, labels = inputs[:128], labels[:128]
    started = time.perf_counter()
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    step = (time.perf_counter() - started) / 100
    epoch = step * math.ceil(50_000 / 128)
    price = {"adaquant_seconds": stage.seconds, "epoch_seconds": epoch, "ratio": stage.seconds / epoch}
    print(f"price: {price}", flush=True)
    return price


def fine_tune(module: QuantizationModule, inputs: Tensor, labels: Tensor, rate: float) -> None:
    """Train weights, biases and ranges of all layers together against the labels, by the straight-through estimator
    and Adam with cosine decay."""
    network = module.network
    parameters = [p for layer in network.layers.values() for p in (layer.weight, layer.bias) if p is not None]
    of_quantizers = [each for quantizer in network.quantizers for each in quantizer.trainables()]
    parameters += [each.parameter for each in of_quantizers if each.role == "scale"]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _FINE_TUNING_STEPS)
    generator = torch.Generator().manual_seed(0)
    with trainable(parameters):
        for _ in range(_FINE_TUNING_STEPS):
            index = torch.randint(len(inputs), (_BATCH,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(module(inputs[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()


def _images(data: str, samples: int, split: str) -> CifarData:
    images = CifarData(data, samples, split=split)
    images.setup()
    return images


def _calibrated(checkpoint: Path, images: CifarData, weight_bits: int, activation_bits: int) -> QuantizationModule:
    """ResNet-20 as sequential AdaQuant starts from it in the pipeline."""
    pl.seed_everything(0, verbose=False)
    trained = CifarClassifier("resnet20", checkpoint)
    module = QuantizationModule(trained, weight_bits=weight_bits, activation_bits=activation_bits)
    run_stages(module, [Calibration(), BatchNormTuning()], images.train_dataloader())
    return module


def _top1(module: QuantizationModule, images: CifarData) -> float:
    return validate(module, images, "top1", "auto")
