"""Networks whose inner channels differ in range, with data for them."""

from itertools import pairwise

import torch
from torch import nn

from tests.networks import calibrated_network, calibration_set


def uneven(*layers) -> nn.Sequential:
    """A network whose inner channels differ in range by a factor of 300, which the layer after them makes up for."""
    model = nn.Sequential(*layers).eval()
    parts = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for first, second in pairwise(parts):
            factors = torch.logspace(-1.2, 1.2, first.weight.shape[0])
            shape = [-1, *[1] * (first.weight.dim() - 1)]
            first.weight.mul_(factors.view(shape))
            first.bias.mul_(factors)
            if getattr(second, "groups", 1) > 1:
                second.weight.div_(factors.view(shape))
            else:
                second.weight.div_(factors.view(1, -1, *[1] * (second.weight.dim() - 2)))
    return model


def linear(activation=nn.ReLU):
    torch.manual_seed(0)
    return uneven(nn.Linear(6, 16), activation(), nn.Linear(16, 12), activation(), nn.Linear(12, 5))


def convolutional():
    torch.manual_seed(0)
    return uneven(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 6, 1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip


IMAGES = torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))


def uneven_network(model, data, **scheme):
    calibration = calibration_set(model, data)
    network = calibrated_network(model, calibration, **{"weight_bits": 8, "edge_bits": None, **scheme})
    return network, calibration


def error(network, data):
    with torch.no_grad():
        quantized = network.model(data)
        with network.quantized(False):
            wanted = network.model(data)
    return float((quantized - wanted).square().mean() / wanted.square().mean())
