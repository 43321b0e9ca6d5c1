"""Exported files of equalized modules: ratios are in the module before, or a multiplication."""

from collections import Counter

import pytest
import torch
from torch import nn

from lightning_calibtip import Calibration, Equalization, QuantizationModule, export_onnx, run_stages
from lightning_calibtip.export.integer import IntegerNetwork
from tests.export.exporting import operators, outputs
from tests.uneven import IMAGES, ROWS, convolutional, linear


@pytest.mark.parametrize("make, data, most", [
    (convolutional, IMAGES, 0), (linear, ROWS, 1), (lambda: linear(nn.GELU), ROWS, 3),
])  # fmt: skip
def test_an_exported_network_computes_the_same(make, data, most, tmp_path):
    options = {"weight_bits": 8, "activation_bits": 6, "edge_bits": None, "target": "onnxruntime"}
    module = QuantizationModule(make(), **options)
    run_stages(module, [Calibration(), Equalization(exponents=[0.5])], [data])
    plain = QuantizationModule(make(), **options)
    run_stages(plain, [Calibration()], [data])
    names = [name for name, layer in module.network.layers.items() if layer.input_ratio is not None]
    assert "2" in names
    export_onnx(module, tmp_path / "net.onnx", data, check=False)
    export_onnx(plain, tmp_path / "plain.onnx", data, check=False)
    (engine,) = outputs(tmp_path / "net.onnx", data)
    with torch.no_grad():
        wanted = module(data)
    # A value at the edge of a step may fall to either side: sums and divisions round otherwise in an engine.
    assert (engine - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    # Absorbed ratios add nothing; the others are a multiplication each.
    absorbed = {planned.absorbs for planned in module.network.plan.modules}
    divided = len({f"{name} input" for name in names} - absorbed)
    added = Counter(operators(tmp_path / "net.onnx")) - Counter(operators(tmp_path / "plain.onnx"))
    assert added == ({"Mul": divided} if divided else {}) and divided <= most
    if make is not convolutional:
        return
    integers = IntegerNetwork(tmp_path / "net.onnx")(data)
    assert (integers - wanted).abs().mean() < 0.02 * wanted.abs().mean()


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.left, self.right = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1.5, 1.5, 8))
            self.left.weight.div_(self.norm.weight)

    def forward(self, x):
        return self.right(torch.tanh(self.left(self.norm(x))))


class Joined(nn.Module):
    """Channels of what is read come from a transposition, as those of heads do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)
        with torch.no_grad():
            factors = torch.logspace(-1, 1, 12)
            self.first.weight.mul_(factors[:, None])
            self.last.weight.div_(factors.view(4, 3).t().reshape(-1))

    def forward(self, x):
        heads = self.first(x).unflatten(-1, (4, 3)).transpose(1, 2)
        return self.last(torch.tanh(heads.transpose(1, 2)).transpose(-1, -2).flatten(2))


def test_channels_that_come_from_a_transposition(tmp_path):
    data = torch.randn(16, 5, 8)
    options = {"weight_bits": 8, "activation_bits": 6, "edge_bits": None, "target": "onnxruntime"}
    module = QuantizationModule(Joined().eval(), **options)
    run_stages(module, [Calibration(), Equalization()], [data])
    assert module.network.layers["last"].input_ratio is not None
    export_onnx(module, tmp_path / "net.onnx", data)
    (engine,) = outputs(tmp_path / "net.onnx", data)
    with torch.no_grad():
        wanted = module(data)
    assert (engine - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_a_layer_norm_takes_ratios_in(tmp_path):
    data = torch.randn(32, 8)
    options = {"weight_bits": 8, "activation_bits": 5, "edge_bits": None, "target": "onnxruntime"}
    module = QuantizationModule(Normalized().eval(), **options)
    run_stages(module, [Calibration(), Equalization(absorb="only")], [data])
    assert module.network.layers["left"].input_ratio is not None
    weight = module.model.norm.weight.clone()
    export_onnx(module, tmp_path / "net.onnx", data, check=False)
    assert torch.equal(module.model.norm.weight, weight)
    (engine,) = outputs(tmp_path / "net.onnx", data)
    with torch.no_grad():
        wanted = module(data)
    assert (engine - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_normalizations_that_share_their_parameters_are_divided_each(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.n1, self.n2, self.a, self.b = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.n2.weight, self.n2.bias = self.n1.weight, self.n1.bias
            with torch.no_grad():
                self.n1.weight.copy_(torch.logspace(-1, 1, 8))
                for layer in (self.a, self.b):
                    layer.weight.div_(self.n1.weight)

        def forward(self, x):
            return self.b(self.n2(torch.tanh(self.a(self.n1(x)))))

    data = torch.randn(64, 8)
    options = {"weight_bits": 8, "activation_bits": 6, "edge_bits": None, "target": "onnxruntime"}
    module = QuantizationModule(Pair().eval(), **options)
    run_stages(module, [Calibration(), Equalization(absorb="only")], [data])
    assert sum(layer.input_ratio is not None for layer in module.network.layers.values()) == 2
    export_onnx(module, tmp_path / "net.onnx", data, check=False)
    (engine,) = outputs(tmp_path / "net.onnx", data)
    with torch.no_grad():
        wanted = module(data)
    assert (engine - wanted).abs().mean() < 0.02 * wanted.abs().mean()
