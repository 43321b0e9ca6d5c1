"""What a user adds from outside the package: one registration each, and every pipeline takes it."""

import pytest
import torch
from torch import nn

from lightning_calibtip import (
    Operand,
    quantize,
    register_cost,
    register_layer,
    register_objective,
    register_observer,
    register_quantizer,
    register_rounding,
)
from lightning_calibtip.network.channels import along_weight
from lightning_calibtip.quantization.affine import fake_quantize
from lightning_calibtip.quantization.affine_quantizer import AffineQuantizer
from lightning_calibtip.quantization.observers import MinMaxObserver
from lightning_calibtip.reconstruction.objectives import Objective
from lightning_calibtip.reconstruction.rounding import Rounding
from tests.networks import as_loader

PIPELINES = ("calibrate", "sequential", "mixed")
SHORT = {"adaquant": {"iterations": 6, "batch_size": 8}, "preparation": {"iterations": 4, "batch_size": 8},
         "allocation": {"compression": 0.22, "checks": 2}, "bias_tuning": {"epochs": 1}}  # fmt: skip


@register_observer("half_minmax")
def half_minmax(options):
    class HalfMinMax(MinMaxObserver):
        """The middle half of the range of values."""

        def _range(self, spec):
            return self.minimum / 2, self.maximum / 2

    return HalfMinMax()


@register_quantizer("power_of_two")
class PowerOfTwoQuantizer(AffineQuantizer):
    """Scales that are powers of two, learned in the exponent: an engine shifts instead of multiplying."""

    def set_range(self, minimum, maximum):
        super().set_range(minimum, maximum)
        with torch.no_grad():
            self.scale.copy_(self.scale.log2().ceil().exp2())

    def fake_quantize(self, x):
        power = self.scale + (self.scale.log2().round().exp2() - self.scale).detach()
        rows, axis = self._rows(x)
        return self._whole(fake_quantize(rows, power, self.zero_point, self.spec.qmin, self.spec.qmax, axis), x)

    def finalize_(self):
        super().finalize_()
        with torch.no_grad():
            self.scale.copy_(self.scale.log2().round().exp2())


@register_objective("absolute_error")
class AbsoluteError(Objective):
    """Sum of absolute differences."""

    def loss(self, output, target, weight):
        difference = (output - target).abs()
        return (difference if weight is None else difference * weight).sum()

    def power(self, target, weight):
        return self.loss(torch.zeros_like(target), target, weight)


@register_rounding("frozen")
class Frozen(Rounding):
    """Leaves weights where they are; scales and biases learn."""


@register_cost("below_8_bits")
def below_8_bits(inputs):
    return inputs.tabulate(lambda name, config: float((config.bit_widths.weight or 32) < 8))


class Blend(nn.Module):
    """A layer whose weight is not called so, with three inputs."""

    def __init__(self, features):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(features, features) / features**0.5)

    def forward(self, x, y, *, z):
        return nn.functional.linear(x + y + z, self.kernel)


register_layer(Blend, 0, [Operand(), Operand(), Operand()], weight="kernel")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.blend, self.last = nn.Linear(6, 8), nn.Linear(8, 8), Blend(8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_var.fill_(0.5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.blend(torch.relu(self.middle(x)), x, z=-x)))


@pytest.fixture
def batches():
    return as_loader(*torch.randn(48, 6, generator=torch.Generator().manual_seed(0)).split(16))


def run(batches, pipeline, options=None, **scheme):
    torch.manual_seed(0)
    merged = {name: {**SHORT.get(name, {}), **(options or {}).get(name, {})} for name in {*SHORT, *(options or {})}}
    return quantize(Net(), batches, None, pipeline, merged, trainer_options={"accelerator": "cpu"}, **scheme)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_layer_type_with_a_weight_of_another_name_and_three_inputs(batches, pipeline):
    network = run(batches, pipeline).module.network
    layer = network.layers["blend"]
    assert len(layer.quantizers) == 4 and layer.weight is layer.module.parametrizations.kernel.original
    # Both the layer before and the blend read the same activation.
    assert layer.input_quantizers[1] is network.layers["middle"].input_quantizers[0] or pipeline == "mixed"
    assert (layer.errors is None) == (pipeline == "calibrate")
    assert len(layer.module.kernel[0].unique()) <= 2**layer.config.weight.bits


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_observer(batches, pipeline):
    network = run(batches, pipeline, {"calibration": {"observer": "half_minmax"}}).module.network
    x = torch.cat(list(batches))
    observer = network.layers["first"].tensors[0].observer
    assert observer.compute_range(network.layers["first"].config.inputs[0])[1] == x.max() / 2


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_kind_of_quantizer(batches, pipeline):
    options = {"bias_tuning": {"scale_rate": 0.05}}
    quantized = run(batches, pipeline, options, weight_quantizer="power_of_two", activation_quantizer="power_of_two")
    for quantizer in quantized.module.network.quantizers:
        exponents = quantizer.scale.log2()
        assert isinstance(quantizer, PowerOfTwoQuantizer) and torch.equal(exponents, exponents.round())


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_objective_and_a_rounding(batches, pipeline):
    options = {"adaquant": {"objective": "absolute_error", "rounding": "frozen"}}
    network = run(batches, pipeline, options).module.network
    # BatchNorm tuning stretches the first one's channels.
    for layer in list(network.layers.values())[1:]:
        # Equalization multiplies channels.
        wanted = layer.float_weight
        if layer.input_ratio is not None:
            wanted = wanted * along_weight(layer.input_ratio, layer.module, layer.type, wanted)
        assert torch.equal(layer.weight, wanted)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_cost_of_the_integer_program(batches, pipeline):
    options = {"allocation": {"budgets": {"below_8_bits": 1}, "compression": None}}
    network = run(batches, pipeline, options, weight_bits=8).module.network
    assert sum(layer.config.weight.bits < 8 for layer in network.layers.values()) <= 1


def test_everything_at_once_is_saved_and_loaded(batches, tmp_path):
    from lightning_calibtip import QuantizationModule

    quantized = run(batches, "sequential", {"calibration": {"observer": "half_minmax"}}, weight_bits=4,
                    weight_quantizer="power_of_two", group_size=4)  # fmt: skip
    quantized.save(tmp_path / "quantized.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=Net())
    x = torch.randn(5, 6)
    assert torch.equal(loaded(x), quantized.module(x))
