"""Parameters of products that modules compute themselves, stacked weights of experts above all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip import Calibration, QuantizationModule, quantize
from lightning_calibtip.network.observe import record
from lightning_calibtip.network.product_parameters import find_product_parameters
from tests.networks import as_loader
from tests.transformer_models import ROTATIONS


class Experts(nn.Module):
    """All experts of all samples at once, weighted; ``down`` is stored the other way around."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 10) * 0.4), nn.Parameter(torch.randn(4, 6, 10) * 0.4)
        self.bias = nn.Parameter(torch.randn(4, 1, 10))

    def forward(self, x, weights):
        hidden = F.relu(torch.einsum("bd,edh->ebh", x, self.up) + self.bias)
        return (torch.bmm(hidden, self.down.transpose(1, 2)) * weights.t().unsqueeze(-1)).sum(0)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.router, self.experts = nn.Parameter(torch.randn(6, 4)), Experts()

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(self.experts(x, (x @ self.router).softmax(-1)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Mixture().eval()


@pytest.fixture
def batches(generator):
    return [torch.randn(16, 3, generator=generator) for _ in range(4)]


def calibrated(net, make_trainer, batches, **options):
    module = QuantizationModule(net, **options)
    make_trainer(Calibration()).fit(module, as_loader(*batches))
    return module


def rounded(parameter, sums_over):
    """The parameter with four bits for each expert and output channel, from minimum to maximum."""
    low, high = (
        f(parameter, sums_over, keepdim=True).clamp(*c) for f, c in ((torch.amin, (None, 0)), (torch.amax, (0,)))
    )
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    return ((parameter / scale).round() + zero).clamp(0, 15).sub(zero) * scale


def test_each_expert_and_output_channel_has_a_scale_of_its_own(net, make_trainer, batches):
    module = QuantizationModule(copy.deepcopy(net), weight_bits=4, activation_bits=None, edge_bits=None)
    make_trainer(Calibration(weight_observer="minmax")).fit(module, as_loader(*batches))
    layers = module.network.layers
    assert layers["experts.up_matrix"].weight.shape == (4 * 10, 6) and layers["router_matrix"].weight.shape == (4, 6)
    assert layers["experts.down_matrix"].weight.shape == (4 * 6, 10)
    with torch.no_grad():
        for owner, name, axis in ((net.experts, "up", 1), (net.experts, "down", 2), (net, "router", 0)):
            getattr(owner, name).copy_(rounded(getattr(owner, name), axis))
        for layer in (net.stem, net.head):
            layer.weight.copy_(rounded(layer.weight, 1))
        torch.testing.assert_close(module(batches[0]), net(batches[0]), rtol=1e-4, atol=1e-5)


def test_both_factors_are_quantized_and_no_product_stays_float(net, make_trainer, batches):
    module = calibrated(copy.deepcopy(net), make_trainer, batches, weight_bits=8, activation_bits=8)
    assert module.network.plan.float_matmuls == {}
    layers = module.network.layers
    assert {name for name in layers if name.endswith("_input")} == {
        "router_input", "experts.up_input", "experts.down_input"
    }  # fmt: skip
    seen = {}
    for name in ("router", "experts.up", "experts.down"):
        site = module.model.get_submodule(f"{name}_input")
        site.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        error = (module(batches[0]) - net(batches[0])).norm() / net(batches[0]).norm()
    assert 0 < error < 0.05
    for name, value in seen.items():
        assert len(value.unique()) <= 256 and layers[f"{name}_input"].config.inputs[0].bits == 8
    assert [seen[name].shape for name in ("router", "experts.up", "experts.down")] == [(16, 6), (16, 6), (4, 16, 10)]
    # The products read what the modules give.
    for name in seen:
        hook = module.model.get_submodule(f"{name}_input").register_forward_hook(
            lambda module, args, output: output * 0
        )
        with torch.no_grad():
            without = module(batches[0])
        hook.remove()
        assert float((without - net(batches[0])).norm() / net(batches[0]).norm()) > 0.05
    lines = {line.name: line for line in module.layer_summary()}
    assert lines["experts"].parameters == 40 and lines["experts"].note == "not a quantizable type of layer"


def test_a_checkpoint_computes_the_same_bits(net, make_trainer, batches, tmp_path):
    module = QuantizationModule(copy.deepcopy(net), weight_bits=4, activation_bits=8)
    trainer = make_trainer(Calibration())
    trainer.fit(module, as_loader(*batches))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "model.ckpt", model=copy.deepcopy(net))
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), module(batches[0]))
    assert "experts.up_matrix.parametrizations.weight.original" in loaded.model.state_dict()
    with pytest.raises(ValueError, match=r"this one has no module .*experts\.down_input"):
        QuantizationModule.load_from_checkpoint(tmp_path / "model.ckpt", model=nn.Sequential(nn.Linear(3, 6)))


def test_adaquant_reconstructs_experts_as_a_whole(net, batches):
    run = quantize(
        net, batches, pipeline="sequential", weight_bits=3, activation_bits=8, edge_bits=None,
        options={"adaquant": {"iterations": 60}}, trainer_options={"accelerator": "cpu"},
    )  # fmt: skip
    layers = run.module.network.layers
    before, after = layers["experts.up_matrix"].errors
    assert after < before and layers["experts.down_input"].errors == (before, after)
    # Nothing but the whole model runs around it.
    assert layers["router_matrix"].errors is None


class Picking(nn.Module):
    """Experts that only some samples go to, and a parameter in a list, which has no forward."""

    def __init__(self, way):
        super().__init__()
        self.way, self.experts = way, nn.Parameter(torch.randn(3, 5, 4))
        self.shared = nn.ParameterList([torch.randn(4, 5)])

    def forward(self, x):
        which = x.sum(1).argsort() % 3
        if self.way == "loop":
            rows = torch.stack([F.linear(x[i], self.experts[e]) for i, e in enumerate(which.tolist())])
        elif self.way == "bmm":
            rows = torch.bmm(self.experts[which], x.unsqueeze(-1)).squeeze(-1)
        else:
            rows = torch.baddbmm(x.new_zeros(1), x.unsqueeze(1), self.experts.index_select(0, which).mT).squeeze(1)
        return rows @ self.shared[0].t()


@pytest.mark.parametrize("way", ["loop", "bmm", "baddbmm"])
def test_experts_are_known_however_they_are_picked(way, make_trainer, generator):
    model, x = Picking(way).eval(), torch.randn(6, 4, generator=generator)
    found = find_product_parameters(model, record(model, lambda: model(x)), [])
    assert found == {"": {"experts": 2}, "shared": {"0": 1}}
    net = nn.Sequential(nn.Linear(4, 4), model)
    module = calibrated(net, make_trainer, [x], weight_bits=8, activation_bits=8)
    assert {"1.experts_matrix", "1.experts_input", "1.shared.0_matrix"} <= module.network.layers.keys()
    assert module.network.plan.float_matmuls == {}
    lines = {line.name: line for line in module.layer_summary()}
    assert lines["1.shared"].note == "what is multiplied with its 0 stays float"


class Unknown(nn.Module):
    """A weight that is computed, a product of two parameters, and one that two modules hold."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
        self.holder = nn.Module()
        self.holder.c = self.c

    def forward(self, x):
        return x @ (self.a @ self.b) @ (2 * self.a) @ self.c


def test_what_is_no_factor_of_its_own_is_left_alone():
    model = Unknown()
    assert find_product_parameters(model, record(model, lambda: model(torch.ones(2, 4))), []) == {}


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_mixtures_of_transformers_have_no_float_product(way, make_trainer, generator):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    if not hasattr(transformers.MixtralForCausalLM, "set_experts_implementation"):
        pytest.skip("experts are linear layers in this release of transformers")
    if way == "grouped_mm" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this release of PyTorch has no grouped_mm")
    net = transformers.MixtralForCausalLM(config).eval()
    net.set_experts_implementation(way)
    batch = {"input_ids": torch.randint(0, 32, (3, 7), generator=generator)}
    wanted = net(**batch).logits.detach()
    module = calibrated(net, make_trainer, [batch], weight_bits=8, activation_bits=8)
    assert set(module.network.plan.float_matmuls) <= ROTATIONS
    experts = {name for name in module.network.layers if "mlp.experts." in name}
    place = "model.layers.0.mlp.experts"
    assert experts == {
        f"{place}.{name}_{kind}" for name in ("gate_up_proj", "down_proj") for kind in ("matrix", "input")
    }
    with torch.no_grad():
        assert float((module(**batch).logits - wanted).norm() / wanted.norm()) < 0.05
