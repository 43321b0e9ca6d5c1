"""What stays float is said once for each kind, and listed layer by layer in the table."""

import torch
from torch import nn

from lightning_calibtip import Calibration, QuantizationModule
from lightning_calibtip.report.table import layer_table
from tests.networks import as_loader


class Branching(nn.Module):
    """Norms, products with weights that are computed, and layers that only some batches would reach."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(5))
        self.mixers = nn.ModuleList(Mixer() for _ in range(4))
        self.first, self.rare = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        for norm in self.norms:
            x = norm(x)
        for mixer in self.mixers:
            x = mixer(x)
        return x


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return x @ (self.weight * 2)


def test_what_stays_float_is_said_once_for_each_kind(make_trainer, caplog):
    module = QuantizationModule(Branching().eval(), weight_bits=8, activation_bits=8)
    make_trainer(Calibration()).fit(module, as_loader(torch.randn(3, 4)))
    table = layer_table(module.layer_summary())
    *lines, count, norms, mixers, rare = table.splitlines()
    assert count == "1 quantized, 0 folded, 13 float" and sum(" float " in line for line in lines) == 13
    assert norms == "float: 5 LayerNorm (not a quantizable type of layer): norms.0, norms.1, norms.2, ..."
    assert mixers == "float: 4 Mixer (computes mm outside of a quantizable layer): mixers.0, mixers.1, mixers.2, ..."
    assert rare == "float: 4 Linear (no calibration batch has reached it): rare.0, rare.1, rare.2, ..."
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_calibtip.network")]
    assert said == [
        "4 modules (mixers.0, mixers.1, mixers.2, ...), each of which computes mm outside of a quantizable layer: that "
        "stays float.",
        "4 layers stay float (rare.0, rare.1, rare.2, ...): no calibration batch has reached it.",
    ]
