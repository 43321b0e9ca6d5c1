"""Calibrated networks without a Trainer, for measurements of single parts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.network.network import QuantizedNetwork
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.quantization.ranges import RangeOptions


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Sequence[Tensor], scheme: QuantizationScheme, observer: str = "mse"
) -> tuple[QuantizedNetwork, CalibrationSet]:
    """Quantize a model in place, with ranges from the batches."""
    model.eval().requires_grad_(False)
    calibration = CalibrationSet(lambda batch, index: model(batch))
    for batch in batches:
        calibration.append(batch)
    network = QuantizedNetwork(model, scheme)
    network.prepare(lambda: calibration.run(0))
    network.attach_observers(RangeOptions(observer=observer, weight_observer=observer))
    with network.observing():
        for index in range(len(calibration)):
            calibration.run(index)
    network.fit_ranges()
    return network, calibration
