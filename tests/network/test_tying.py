"""Parameters that modules share, and parameters that are computed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_calibtip import quantize
from lightning_calibtip.network.layer_types import quantizable_layers, register_layer
from lightning_calibtip.network.tying import (
    Ties,
    bake_parametrizations,
    find_ties,
    own_parameter,
    remove_parametrization,
    share_parametrization,
    stop_sharing_parametrization,
    with_baked_parametrizations,
)
from lightning_calibtip.quantization.spec import BitWidths


def ties_of(model: nn.Module) -> Ties:
    return find_ties(model, quantizable_layers(model))


def model_of(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


def test_nothing_shared_needs_nothing():
    assert ties_of(model_of(a=nn.Linear(2, 2), b=nn.Embedding(2, 2))) == Ties({}, {})


def test_the_last_holder_of_a_shared_parameter_keeps_it():
    model = model_of(a=nn.Linear(2, 2), b=nn.Linear(2, 2), c=nn.Linear(2, 2))
    model["a"].weight = model["b"].weight = model["c"].weight
    model["a"].bias = model["b"].bias
    assert ties_of(model) == Ties({"a": ("weight", "bias"), "b": ("weight",)}, {})


def test_a_parameter_that_another_module_holds_too_is_copied_for_every_layer():
    model = model_of(a=nn.Linear(2, 2), b=nn.Linear(2, 2), norm=nn.LayerNorm(2))
    model["a"].bias = model["b"].bias = model["norm"].bias
    assert ties_of(model) == Ties({"a": ("bias",), "b": ("bias",)}, {})


def test_weights_of_an_embedding_stay_tied_to_the_first_one_that_has_them():
    model = model_of(head=nn.Linear(2, 3), table=nn.Embedding(3, 2), again=nn.Embedding(3, 2), free=nn.Embedding(3, 2))
    model["head"].weight = model["again"].weight = model["table"].weight
    assert ties_of(model) == Ties({}, {"head": "table", "again": "table"})


def test_the_order_of_the_model_counts_and_not_that_of_the_layers():
    model = model_of(a=nn.Embedding(3, 2), b=nn.Embedding(3, 2), c=nn.Linear(2, 2), d=nn.Linear(2, 2))
    model["a"].weight, model["c"].bias = model["b"].weight, model["d"].bias
    wanted = Ties({"c": ("bias",)}, {"b": "a"})
    assert find_ties(model, dict(model.items())) == find_ties(model, dict(reversed(model.items()))) == wanted


def test_a_weight_of_another_name_is_tied_by_that_name():
    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.weight = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2))

    register_layer(Projection, weight="kernel")
    model = model_of(table=nn.Embedding(3, 2), by_weight=Projection(), by_name=Projection())
    model["by_weight"].kernel = model["table"].weight
    model["by_name"].weight = model["table"].weight
    assert ties_of(model) == Ties({"by_name": ("weight",)}, {"by_weight": "table"})


def test_what_a_layers_parametrization_is_computed_from_is_not_shared_once_it_is_baked():
    model = model_of(a=parametrizations.weight_norm(nn.Linear(2, 2)), b=nn.Linear(2, 2))
    model["b"].weight = model["a"].parametrizations.weight.original1
    assert ties_of(model) == Ties({}, {})
    bake_parametrizations(model["a"])
    assert ties_of(model) == Ties({}, {})


@st.composite
def models(draw) -> nn.ModuleDict:
    """Layers, embeddings and normalizations of one size that share parameters in some way."""
    makers = [lambda: nn.Linear(2, 2), lambda: nn.Embedding(2, 2), lambda: nn.LayerNorm((2, 2))]
    chosen = draw(st.lists(st.sampled_from(makers), min_size=1, max_size=6))
    model = nn.ModuleDict({f"m{index}": make() for index, make in enumerate(chosen)})
    pool = [nn.Parameter(torch.randn(2, 2)) for _ in range(2)]
    biases = [nn.Parameter(torch.randn(2)) for _ in range(2)]
    for module in model.values():
        if (index := draw(st.integers(0, 2))) < 2:
            module.weight = pool[index]
        if isinstance(module, nn.Linear) and (index := draw(st.integers(0, 2))) < 2:
            module.bias = biases[index]
    return model


@settings(deadline=None, max_examples=100)
@given(models())
def test_after_the_copies_layers_share_nothing_but_embeddings_and_no_copy_is_needless(model):
    state = {name: (id(p), p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    ties = ties_of(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert state[name][0] == id(parameter) and torch.equal(parameter, state[name][1]), "the model has changed"
    for name, parameters in ties.copies.items():
        for parameter in parameters:
            shared = model[name]._parameters[parameter]
            holders = [m for m in model.modules() if any(p is shared for p in m._parameters.values())]
            assert len(holders) > 1, "a copy of what is its own"
            own_parameter(model[name], parameter)
    for name, layer in quantizable_layers(model).items():
        for key, parameter in layer._parameters.items():
            others = [
                other
                for other, module in model.items()
                if module is not layer and any(p is parameter for p in module._parameters.values())
            ]
            if name in ties.tied and key == "weight":
                assert isinstance(model[ties.tied[name]], nn.Embedding) and ties.tied[name] in others
            elif key == "weight" and isinstance(layer, nn.Embedding):
                assert all(ties.tied.get(other) == name or isinstance(model[other], nn.LayerNorm) for other in others)
            else:
                assert not others


def test_a_layer_bakes_to_plain_parameters_of_the_present_value():
    layer = parametrizations.spectral_norm(nn.Linear(3, 3)).eval()
    wanted, other = layer.weight.detach().clone(), copy.deepcopy(layer)
    bake_parametrizations(layer)
    assert type(layer) is nn.Linear and isinstance(layer._parameters["weight"], nn.Parameter)
    assert torch.equal(layer.weight, wanted) and not layer.weight.requires_grad
    assert parametrize.is_parametrized(other) and torch.equal(other.weight, wanted)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_baked_copy_computes_the_same_and_the_layer_stays_as_it_is():
    layer = parametrizations.weight_norm(Own(3, 3)).eval()
    keys, cls, x = list(layer.state_dict()), type(layer), torch.randn(2, 3)
    baked = with_baked_parametrizations(layer)
    assert type(baked) is Own and isinstance(baked._parameters["weight"], nn.Parameter)
    assert torch.equal(baked(x), layer(x))
    assert baked.bias is layer.bias
    with torch.no_grad():
        baked.weight.zero_()
    baked._parameters["bias"] = None
    assert layer.weight.abs().sum() > 0 and layer.bias is not None
    assert type(layer) is cls and list(layer.state_dict()) == keys


def test_a_layer_without_parametrizations_is_its_own_baked_copy():
    layer = nn.Linear(2, 2)
    assert with_baked_parametrizations(layer) is layer


@pytest.mark.parametrize("keep_value", [True, False])
def test_removing_a_parametrization_concerns_one_layer_alone(keep_value):
    layer = nn.Linear(2, 2)
    original = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    other = copy.deepcopy(layer)
    remove_parametrization(layer, "weight", keep_value)
    assert not parametrize.is_parametrized(layer)
    torch.testing.assert_close(layer.weight, original.tanh() if keep_value else original)
    torch.testing.assert_close(other.weight, original.tanh())


def test_a_shared_parametrization_acts_on_both_layers_and_can_be_taken_off_again():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.randn(3, 2))

    register_layer(Table, operands=(), weight="rows")
    table, layer = Table(), nn.Linear(2, 3)
    weight = table.rows
    layer.weight = weight
    parametrize.register_parametrization(table, "rows", nn.Tanh())
    share_parametrization(layer, table, "weight")
    assert torch.equal(layer.weight, weight.tanh()) and layer.parametrizations.weight.original is weight
    stop_sharing_parametrization(layer, "weight")
    assert type(layer) is nn.Linear and layer.weight is weight and list(layer._parameters) == ["bias", "weight"]
    assert torch.equal(table.rows, weight.tanh())


def test_a_tied_weight_is_shown_at_the_bits_of_the_layer_that_owns_it():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    options = {"weight_bits": 4, "edge_bits": None, "trainer_options": {"accelerator": "cpu"}}
    run = quantize(model, [torch.randint(5, (8, 3))], pipeline="calibrate", **options)
    run.module.network.switch("0", BitWidths(8, None))
    bits = {line.name: line.weight_bits for line in run.module.layer_summary()}
    assert bits == {"0": 8, "1": 4, "2": 8}
    found = {layer.name: layer for layer in run.diagnose().layers}
    assert all("(4," not in remedy.code for remedy in found["2"].remedies)
