"""Quantized networks made without a Trainer, and short ways to feed and ask modules."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_calibtip.calibration.activation_store import ActivationStore
from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.calibration.recording import Recording
from lightning_calibtip.network.network import QuantizedNetwork
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.quantization.ranges import RangeOptions


def calibration_set(model: nn.Module, *batches: Tensor) -> CalibrationSet:
    calibration = CalibrationSet(lambda batch, index: model(batch))
    for batch in batches:
        calibration.append(batch)
    return calibration


def recorded(*values) -> Recording:
    recording = Recording(ActivationStore(), len(values))
    for value in values:
        recording.append(value)
    return recording


def calibrated_network(
    model: nn.Module, calibration: CalibrationSet, observer: str = "mse", **scheme
) -> QuantizedNetwork:
    network = QuantizedNetwork(model, QuantizationScheme(**{"weight_bits": 4, "activation_bits": 4, **scheme}))
    network.prepare(lambda: calibration.run(0))
    network.attach_observers(RangeOptions(observer, observer))
    for index in range(len(calibration)):
        with network.observing(calibration.tokens(index)), torch.no_grad():
            calibration.run(index)
    network.fit_ranges()
    return network


def as_loader(*batches):
    return DataLoader(list(batches), batch_size=None)


def logits_of(module, images):
    with torch.no_grad():
        return module(images)
