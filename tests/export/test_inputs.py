"""Which dimensions of inputs are free in a file."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from lightning_calibtip import export_onnx, quantize


class TimeFirst(nn.Module):
    """Samples are the second dimension of one input, and the first of the other."""

    def __init__(self):
        super().__init__()
        self.recent, self.fixed = nn.Linear(4, 8), nn.Linear(3, 8)

    def forward(self, sequence, context):
        return self.recent(sequence).mean(0) + self.fixed(context)


def test_samples_in_another_dimension_are_named_or_the_error_says_how(tmp_path):
    batch = {"sequence": torch.randn(7, 5, 4), "context": torch.randn(5, 3)}
    run = quantize(
        TimeFirst(), [batch], pipeline="calibrate", target="onnxruntime", trainer_options={"accelerator": "cpu"}
    )
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"inferred a static shape of 5 for .*context.*dynamic=\{input: \{dimension"):
        export_onnx(run.module, path, batch)
    assert not path.exists()
    export_onnx(run.module, path, batch, dynamic={"sequence": {1: "samples"}, "context": {0: "samples"}})
    session = onnxruntime.InferenceSession(path)
    given = {"sequence": np.zeros((7, 9, 4), np.float32), "context": np.zeros((9, 3), np.float32)}
    assert session.run(None, given)[0].shape == (9, 8)
