"""Quantized modules to export, and what their files are asked."""

import numpy as np
import onnx
import torch
from torch import nn

from lightning_calibtip import quantize
from lightning_calibtip.export.engine import make_session, run_session


def quantized(model: nn.Module, batch, pipeline: str = "calibrate", **options):
    options = {"target": "onnxruntime", **options}
    return quantize(model, [batch], pipeline=pipeline, trainer_options={"accelerator": "cpu"}, **options).module


def outputs(path, *values) -> list[torch.Tensor]:
    session = make_session(path, threads=1)
    feeds = {place.name: value.numpy() for place, value in zip(session.get_inputs(), values, strict=True)}
    return [torch.from_numpy(np.asarray(output)) for output in run_session(session, feeds)]


def operators(path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


class Residual(nn.Module):
    """A network of convolutions with what engines find hard between them: sums, a padded shortcut, pools, a join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        out = self.conv2(torch.relu(self.conv1(x)))
        out += x
        out = torch.relu(out)
        shortcut = nn.functional.pad(out[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        out = nn.functional.relu6(self.down(nn.functional.pad(out, (0, 1, 0, 1))) + shortcut)
        out = torch.cat([torch.relu(self.left(out)), torch.relu(self.right(out))], 1)
        return self.head(out.mean((2, 3)))
