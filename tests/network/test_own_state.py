"""Layers that write their state in a way of their own."""

import pytest
import torch
from torch import nn

from lightning_calibtip import Calibration, QuantizationModule, export_packed, load_packed
from tests.networks import as_loader, logits_of


class OwnState(nn.Linear):
    """Writes its state itself, as layers of PyTorch Geometric do."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name in ("weight", "bias"):
            value = getattr(self, name)
            destination[prefix + name] = value if keep_vars else value.detach()


@pytest.mark.parametrize("weight_bits", [4, None])
def test_a_layer_that_writes_its_state_itself_comes_back(weight_bits, make_trainer, generator, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(OwnState(4, 6), nn.ReLU(), OwnState(6, 3)).eval()

    rows = torch.randn(16, 4, generator=generator)
    module = QuantizationModule(make(), weight_bits=weight_bits, edge_bits=None)
    trainer = make_trainer(Calibration())
    trainer.fit(module, as_loader(rows))
    trainer.save_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    export_packed(module, tmp_path / "own.safetensors")
    for loaded in (
        QuantizationModule.load_from_checkpoint(tmp_path / "own.ckpt", model=make()),
        load_packed(tmp_path / "own.safetensors", make()),
    ):
        assert torch.equal(logits_of(loaded, rows), logits_of(module, rows))
