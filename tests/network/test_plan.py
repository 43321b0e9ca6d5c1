import copy
import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_calibtip.network.apply import apply
from lightning_calibtip.network.observe import observe
from lightning_calibtip.network.plan import plan
from lightning_calibtip.network.quantization_plan import QuantizationPlan
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.network.summary import summarize
from lightning_calibtip.network.targets import Target, register_target
from lightning_calibtip.quantization.spec import BitWidths, PerChannel, PerTensor, TensorSpec
from tests.conftest import randomize_batch_norms
from tests.networks import calibrated_network, calibration_set


class Everything(nn.Module):
    """A fold, a parametrized weight, a tied embedding, shared convolutions, a product of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.a, self.b = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)
        self.norm, self.late_norm = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.fc = parametrizations.weight_norm(nn.Linear(8, 8))
        self.table = nn.Parameter(torch.randn(8, 8))
        self.out.weight, self.b.weight = self.embed.weight, self.a.weight

    def forward(self, tokens):
        x = self.norm(self.a(self.embed(tokens).transpose(1, 2)))
        x = self.late_norm(torch.relu(self.b(x))).transpose(1, 2)
        return self.out(self.fc(x) @ self.table)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Everything().eval()


@pytest.fixture
def tokens(generator):
    return torch.randint(0, 10, (6, 5), generator=generator)


def snapshot(model):
    classes = [(name, type(module)) for name, module in model.named_modules()]
    return copy.deepcopy(model.state_dict()), classes, [name for name, _ in model.named_parameters()]


def test_planning_changes_nothing_and_repeats_itself(model, tokens):
    structure = observe(model, lambda: model(tokens))
    state, classes, parameters = snapshot(model)
    first = plan(model, structure, QuantizationScheme(weight_bits=4))
    assert first == plan(model, structure, QuantizationScheme(weight_bits=4))
    after, now_classes, now_parameters = snapshot(model)
    assert now_classes == classes and now_parameters == parameters
    assert all(torch.equal(after[key], state[key]) for key in state) and after.keys() == state.keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_plan_is_frozen_and_survives_json(model, tokens):
    decided = plan(model, observe(model, lambda: model(tokens)), QuantizationScheme(weight_bits=4, group_size=32))
    with pytest.raises(FrozenInstanceError):
        decided.modules = ()
    assert QuantizationPlan.from_dict(json.loads(json.dumps(decided.to_dict()))) == decided
    assert hash(decided.layers["fc"].config) == hash(copy.deepcopy(decided.layers["fc"].config))


def test_a_plan_tells_the_fate_of_every_module(model, tokens):
    decided = plan(model, observe(model, lambda: model(tokens)), QuantizationScheme(weight_bits=4))
    assert list(decided.layers) == ["embed", "a", "b", "fc", "table_matrix", "table_input", "out"]
    assert [(fold.layer, fold.normalization) for fold in decided.folds] == [("a", "norm")]
    assert decided.unfolded_norms == {"late_norm": "no convolution or linear layer right before it"}
    assert decided.float_matmuls == {} and decided.tied == {"out": "embed"}
    assert sum(bool(layer.copies) for layer in decided.layers.values()) == 1
    assert [name for name, layer in decided.layers.items() if layer.pinned] == ["embed", "out"]
    assert decided.layers["embed"].config.inputs == () and decided.layers["out"].config.weight.bits == 8
    assert decided.layers["fc"].config.weight == TensorSpec(4, False, PerChannel(0))
    assert decided.layers["fc"].config.inputs == (TensorSpec(8, False, PerTensor(), one_sided=True),)


def test_applying_a_stored_plan_to_another_copy_gives_the_same_summary(model, tokens):
    decided = plan(model, observe(model, lambda: model(tokens)), QuantizationScheme(weight_bits=4))
    stored = QuantizationPlan.from_dict(json.loads(json.dumps(decided.to_dict())))
    layers = apply(Everything().eval(), stored)
    assert list(layers) == list(decided.layers) and summarize(stored) == summarize(decided)
    assert layers["out"].tied_to is layers["embed"]


def test_applying_a_plan_computes_the_same_as_the_float_model(model, tokens):
    wanted = model(tokens)
    layers = apply(model, plan(model, observe(model, lambda: model(tokens)), QuantizationScheme()))
    torch.testing.assert_close(model(tokens), wanted, rtol=1e-4, atol=1e-4)
    for layer in layers.values():
        layer.detach()
    torch.testing.assert_close(model(tokens), wanted, rtol=1e-4, atol=1e-4)
    assert type(model.a) is nn.Conv1d and type(model.out) is nn.Linear


def test_a_plan_of_another_model_is_refused(model, tokens):
    decided = plan(model, observe(model, lambda: model(tokens)), QuantizationScheme())
    with pytest.raises(ValueError, match="of another model: this one has no module a, b"):
        apply(nn.Sequential(nn.Linear(8, 8)), decided)
    untied = Everything()
    untied.out.weight = nn.Parameter(torch.zeros(10, 8))
    with pytest.raises(ValueError, match="weight of out tied to an embedding's, this model has not"):
        apply(untied, decided)
    other = Everything()
    other.fc = nn.ReLU()
    with pytest.raises(ValueError, match="fc is a ReLU here, and was a"):
        apply(other, decided)


def test_a_tied_layer_left_in_float_gives_the_others_a_copy(model, tokens):
    decided = plan(model, observe(model, lambda: model(tokens)), QuantizationScheme(overrides={"embed": None}))
    assert decided.tied == {} and decided.layers["out"].copies == ("weight",)
    assert decided.float_layers == {"embed": "left float by an override"}


def test_a_float_layer_that_shares_its_weight_is_not_changed_by_the_fold_of_the_other():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)
            self.norm_a, self.norm_b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.last(self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))

    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(4, 4, 3)
    randomize_batch_norms(model, torch.Generator().manual_seed(0))
    wanted = model(x)
    apply(model, plan(model, observe(model, lambda: model(x)), QuantizationScheme(overrides={"a": None})))
    # Folding reorders float32 products and sums.
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


class SymmetricWithOutputs(Target):
    """A target with signed weights and quantized outputs of linear layers."""

    def config(self, name, layer_type, config):
        output = TensorSpec(8, one_sided=True) if name == "fc" else None
        return replace(config, weight=config.weight and replace(config.weight, symmetric=True), output=output)


register_target(SymmetricWithOutputs("symmetric_with_outputs"))


def test_formats_that_one_weight_cannot_have_at_once_untie_it(model, tokens):
    class SymmetricHead(Target):
        def config(self, name, layer_type, config):
            return replace(config, weight=replace(config.weight, symmetric=True)) if name == "out" else config

    register_target(SymmetricHead("symmetric_head"))
    decided = plan(model, observe(model, lambda: model(tokens)), QuantizationScheme(target="symmetric_head"))
    assert decided.tied == {} and decided.layers["out"].copies == ("weight",)
    layers = apply(model, decided)
    assert layers["out"].weight_quantizer.spec.symmetric and not layers["embed"].weight_quantizer.spec.symmetric


def test_a_target_decides_before_calibration_what_is_quantized_how(model, tokens):
    calibration = calibration_set(model, tokens)
    network = calibrated_network(model, calibration, target="symmetric_with_outputs", weight_bits=8, activation_bits=8)
    seen = []
    model.fc.register_forward_hook(lambda m, a, out: seen.append(out))
    model(tokens)
    layer = network.layers["fc"]
    assert layer.weight_quantizer.zero_point.abs().max() == 0
    grid = seen[0] / layer.output_quantizer.scale
    assert len(seen[0].unique()) <= 256 and (grid - grid.round()).abs().max() < 1e-3
    assert network.config_for("fc", BitWidths(4, 8)).weight.symmetric
    with network.quantized(False):
        assert len(model.fc(torch.randn(100, 8)).unique()) > 256
    lines = {line.name: line for line in network.summary()}
    assert "output at 8 bits" in lines["fc"].note
