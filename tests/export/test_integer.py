import pytest
import torch
from torch import nn

from lightning_calibtip import export_onnx
from lightning_calibtip.export.fixed_point import fixed_point, require_int32, rescale
from lightning_calibtip.export.integer import IntegerNetwork
from tests.export.exporting import Residual, outputs, quantized


@pytest.fixture
def images():
    return torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def exported(model, batch, path, **options):
    torch.manual_seed(0)
    module = quantized(model, batch, **options)
    export_onnx(module, path, batch, check=False)
    return module, IntegerNetwork(path)


def test_multipliers_are_of_31_bits_and_rescaling_rounds_to_the_nearest():
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(1000, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(
        -9, 1, (1000,), generator=generator
    )
    by = fixed_point(factors)
    assert by.multiplier.min() >= 2**30 and by.multiplier.max() < 2**31
    values = torch.randint(-(2**31) + 1, 2**31, (1000,), generator=generator)
    error = rescale(values, by).double() - values.double() * factors
    # Half a step, and the 32nd bit of the multiplier.
    assert (error.abs() <= 0.5 + (values.double() * factors).abs() * 2.0**-31).all()
    for factor in (0.5, 1.0, 3.0, 2.0**-40, 1 - 2.0**-40):
        by = fixed_point(torch.tensor(factor, dtype=torch.float64))
        assert rescale(torch.tensor([5, -7, 0]), by).tolist() == [
            round(5 * factor + 1e-9),
            round(-7 * factor + 1e-9),
            0,
        ]


def test_what_cannot_be_rescaled_or_summed_is_an_error():
    with pytest.raises(ValueError, match="must be positive"):
        fixed_point(torch.tensor([0.5, 0.0]))
    with pytest.raises(OverflowError, match=r"conv1: .* 2,147,483,648, does not fit 32 bits"):
        require_int32(torch.tensor([2**31]), "conv1")


@pytest.mark.parametrize("layer", [
    nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(3, 4, 3, dilation=2, bias=False),
])  # fmt: skip
@pytest.mark.parametrize("weight_bits, activation_bits", [(8, 8), (3, 5)])
def test_a_layer_differs_by_at_most_a_step(layer, weight_bits, activation_bits, images, tmp_path):
    model = nn.Sequential(layer, nn.ReLU6(), nn.Conv2d(layer.out_channels, 4, 1))
    formats = {"weight_bits": weight_bits, "activation_bits": activation_bits, "edge_bits": None}
    module, network = exported(model, images, tmp_path / "net.onnx", **formats)
    first, second = network.compare(module, images)
    assert (first.layer, first.share) == ("0", 0.0)
    # Where a sum of float32 lies on the other side of the edge of a step.
    assert second.layer == "2" and second.steps <= 1 and second.share < 1e-3


def test_channels_whose_weights_are_next_to_nothing_have_biases_that_fit(images, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(600, 4))
    with torch.no_grad():
        # What is left of a channel whose BatchNorm has a gamma of nearly 0.
        model[0].weight[2] *= 1e-9
        model[0].bias[2] = 1.5
    module, network = exported(model, images, tmp_path / "net.onnx")
    (difference, *_) = network.compare(module, images)
    assert difference.share == 0.0
    (engine,) = outputs(tmp_path / "net.onnx", images)
    assert (network(images) - engine).abs().max() < 2 / 255 * engine.abs().max()
    assert (module(images) - model(images)).abs().max() < 0.05 * model(images).abs().max()


def test_a_whole_network_decides_alike(images, tmp_path):
    module, network = exported(Residual(), images, tmp_path / "net.onnx")
    assert network.agreement(module, images.split(16)) > 0.9
    lines = network.compare(module, images)
    assert {"stem", "conv1", "addition_0", "addition_1", "average_pool_0", "head"} <= {line.layer for line in lines}
    assert max(line.steps for line in lines) <= 6
    # The engine rounds as the integers do: both come from the same sums.
    (engine,) = outputs(tmp_path / "net.onnx", images)
    assert (network(images) - engine).abs().max() < 6 / 255 * engine.abs().max()
    read = [values for of_layer in network.integers.values() for values in of_layer]
    assert all(values.dtype == torch.int64 and values.min() >= 0 and values.max() <= 255 for values in read)


def test_what_is_not_computed_in_integers_is_named(images, tmp_path):
    _, network = exported(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 1)), images, tmp_path / "a")
    with pytest.raises(NotImplementedError, match="1/Sigmoid: Sigmoid is not computed in integers here"):
        network(images)
    with pytest.raises(FileNotFoundError, match="no_such"):
        IntegerNetwork(tmp_path / "no_such.onnx")


def test_linear_layers_on_tokens_have_channels_last(tmp_path):
    tokens = torch.randn(16, 12, 3)
    model = nn.Sequential(nn.Linear(3, 12, bias=False), nn.ReLU(), nn.Linear(12, 12, bias=False))
    module, network = exported(model, tokens, tmp_path / "net.onnx")
    assert (network(tokens) - module(tokens)).abs().max() < 3 / 255 * module(tokens).abs().max()


def test_weights_of_4_bits_and_layers_that_run_twice(images, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            return self.b(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    module = quantized(Twice(), images, weight_bits=4, edge_bits=None)
    export_onnx(module, tmp_path / "net.onnx", images, check=False, int4=True)
    network = IntegerNetwork(tmp_path / "net.onnx")
    assert (network(images) - module(images)).abs().max() < 3 / 255 * module(images).abs().max()
    assert [line.layer for line in network.compare(module, images)] == ["a"]


def test_several_inputs_are_refused(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x, y):
            return self.fc(x) + y

    batch = {"x": torch.randn(4, 3), "y": torch.randn(4, 2)}
    _, network = exported(Two(), batch, tmp_path / "net.onnx")
    with pytest.raises(NotImplementedError, match="has 2 inputs"):
        network(batch["x"])
