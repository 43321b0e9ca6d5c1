"""Layers of message passing: found by running, quantized, kept, reloaded, and refused where no engine runs them."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_calibtip import QuantizationModule, export_onnx, export_packed, load_packed, quantize
from lightning_calibtip.network.message_passing import message_factors
from lightning_calibtip.quantization.quantizers import Quantizer
from tests.graphs import GraphNet, gnn, karate, make, mlp
from tests.products import products_of

from torch_geometric import transforms  # isort: skip

CPU = {"trainer_options": {"accelerator": "cpu"}}
PASSED = {
    "gcn": ["lin", "factor_edge_weight", "factor_x_j", "messages", "aggregates"],
    "gat": ["lin", "factor_alpha", "factor_x_j", "messages", "aggregates"],
    "gin": ["messages", "aggregates", "nn.0", "nn.3"],
    "sage": ["messages", "aggregates", "lin_l", "lin_r"],
    "edge": ["nn.0", "nn.3", "messages", "aggregates"],
}


def whole(data):
    """All nodes count."""
    data = copy.copy(data)
    del data.train_mask
    return data


def sparse(data, layout=torch.sparse_csr):
    return transforms.ToSparseTensor(layout=layout)(copy.copy(data))


def calibrated(net, data, **options):
    return quantize(net, [data], pipeline="calibrate", **{"edge_bits": None, **options}, **CPU)


@pytest.mark.parametrize("name", PASSED)
def test_weights_messages_and_aggregates_are_quantized_and_the_users_classes_stay(name):
    net, data = make(name), whole(karate())
    classes, wanted = [type(net.first), type(net.second)], net(data)
    module = calibrated(net, data).module
    names = [f"{layer}.{child}" for layer in ("first", "second") for child in PASSED[name]]
    assert sorted(module.network.layers) == sorted(names)
    assert not module.network.float_layers and not module.network.plan.float_matmuls
    assert [type(module.model.first), type(module.model.second)] == classes
    assert torch.equal(net(data), wanted), "the user's model is left as it was"
    with module.quantized(False):
        # BatchNorms are folded.
        torch.testing.assert_close(module(data), wanted, rtol=1e-4, atol=1e-5)
    error = float((module(data) - wanted).norm() / wanted.norm())
    assert 0 < error < 0.1


def on_grid(quantizer: Quantizer, x: torch.Tensor) -> bool:
    integers = x / quantizer.scale + quantizer.zero_point
    return bool(((integers - integers.round()).abs() < 1e-2).all() and quantizer.spec.qmin - 0.01 <= integers.min())


@pytest.mark.parametrize("name", PASSED)
def test_all_factors_of_products_and_what_is_summed_along_edges_are_on_grids(name):
    module = calibrated(make(name), whole(karate()), weight_bits=4, activation_bits=4).module
    layer, seen = module.model.first, []

    def before_message(owner, inputs):
        for key, child in message_factors(owner).items():
            seen.append(on_grid(child.input_quantizers["0"], inputs[0][key]))

    def after_message(owner, inputs, output):
        seen.append(on_grid(owner.messages.input_quantizers["0"], output))

    def after_aggregate(owner, inputs, output):
        seen.append(on_grid(owner.aggregates.input_quantizers["0"], output))

    layer.register_message_forward_pre_hook(before_message)
    layer.register_message_forward_hook(after_message)
    layer.register_aggregate_forward_hook(after_aggregate)
    products = products_of(module, whole(karate()))
    assert len(seen) == 2 + len(message_factors(layer)) and all(seen)
    linear = [operands for function, operands in products if function == "linear"]
    assert len(linear) == sum(layer.has_weight for layer in module.network.layers.values())
    assert all(all(operands) for operands in linear)


def test_what_a_linear_layer_reads_of_an_aggregation_has_one_quantizer():
    layers = calibrated(make("sage"), whole(karate())).module.network.layers
    assert layers["first.aggregates"].input_quantizers == layers["first.lin_l"].input_quantizers


class Weighted(gnn.MessagePassing):
    """A user's own layer, with a message of its own and a weight that no module holds."""

    def __init__(self, inputs, outputs):
        super().__init__(aggr="mean")
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x, edge_index):
        return self.propagate(edge_index, x=x @ self.weight, gate=torch.sigmoid(x.sum(1, keepdim=True)))

    def message(self, x_j, gate_i):
        return gate_i * x_j


def test_a_users_own_layer_is_quantized_alone_in_its_model():
    net, data = GraphNet(Weighted(34, 6), Weighted(6, 4)).eval(), whole(karate())
    module = calibrated(net, data).module
    children = ["weight_matrix", "weight_input", "factor_gate_i", "factor_x_j", "messages", "aggregates"]
    assert sorted(module.network.layers) == sorted(f"{a}.{b}" for a in ("first", "second") for b in children)
    assert isinstance(module.model.first, Weighted)
    wanted = net(data)
    assert float((module(data) - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=str)
@pytest.mark.parametrize("name", ["gcn", "gin", "sage"])
def test_a_sparse_adjacency_makes_its_messages_too(name, layout):
    data = whole(karate())
    dense, thin = calibrated(make(name), data).module, calibrated(make(name), sparse(data, layout)).module
    assert list(thin.network.layers) == list(dense.network.layers) and not thin.network.plan.float_matmuls
    # The same messages, which are summed in another order.
    torch.testing.assert_close(thin(sparse(data, layout)), dense(data), rtol=1e-3, atol=1e-4)


class Unfaithful(gnn.GCNConv):
    def message_and_aggregate(self, adj_t, x):
        return 2 * super().message_and_aggregate(adj_t, x)


def test_a_fused_product_that_is_something_else_stays_fused_and_is_named(caplog):
    net = GraphNet(Unfaithful(34, 8), gnn.GCNConv(8, 4)).eval()
    data = sparse(whole(karate()))
    wanted = net(data)
    with caplog.at_level(logging.WARNING):
        module = calibrated(net, data).module
    assert "something else than message_and_aggregate" in caplog.text
    assert "first.messages" not in module.network.layers and "first.aggregates" in module.network.layers
    assert set(module.network.plan.float_matmuls) == {"first", "second"}
    assert float((module(data) - wanted).norm() / wanted.norm()) < 0.1


def test_what_stays_float_is_named():
    modules = {each.name: each for each in calibrated(make("gat"), whole(karate())).module.network.plan.modules}
    assert modules["first"].reason == "its own att_src, att_dst, bias stay float"
    # It calls the forward of its linear layers, and not these.
    net = GraphNet(gnn.TAGConv(34, 8, K=1), gnn.GCNConv(8, 4)).eval()
    module = calibrated(net, whole(karate())).module
    assert list(module.network.float_layers) == ["first.lins.1"] and list(module.network.plan.float_matmuls) == [
        "first"
    ]


def test_overrides_name_messages_before_the_model_has_run():
    module = calibrated(make("gcn"), karate(), overrides={"*.messages": None, "first.factor_*": (None, 4)}).module
    assert list(module.network.float_layers) == ["first.messages", "second.messages"]
    assert module.network.layers["first.factor_x_j"].config.bit_widths.activation == 4
    with pytest.raises(ValueError, match=r"overrides\['first.massages'\] matches no quantizable layer"):
        QuantizationModule(make("gcn"), overrides={"first.massages": 4})


def test_the_first_and_the_last_layer_have_weights_at_edge_bits():
    module = calibrated(make("gcn"), karate(), weight_bits=4, activation_bits=4, edge_bits=8).module
    bits = {name: layer.config.weight.bits for name, layer in module.network.layers.items() if layer.has_weight}
    assert bits == {"first.lin": 8, "second.lin": 8}
    net = nn.ModuleList([gnn.GINConv(mlp(34, 8)), gnn.GINConv(mlp(8, 8)), gnn.GINConv(mlp(8, 4))])
    deep = GraphNet(net[0], GraphChain(net[1], net[2])).eval()
    layers = calibrated(deep, karate(), weight_bits=4, activation_bits=4, edge_bits=8).module.network.layers
    at_8 = [name for name, layer in layers.items() if layer.has_weight and layer.config.weight.bits == 8]
    assert at_8 == ["first.nn.0", "second.second.nn.3"]


class GraphChain(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x, edge_index):
        return self.second(self.first(x, edge_index).relu(), edge_index)


SHORT = {"adaquant": {"iterations": 4}, "preparation": {"iterations": 2}, "allocation": {"compression": 0.25},
         "bias_tuning": {"epochs": 1}}  # fmt: skip


@pytest.mark.parametrize("pipeline", ["sequential", "advanced", "mixed"])
@pytest.mark.parametrize("name", ["gcn", "gat", "gin"])
def test_every_pipeline_runs_and_its_checkpoint_reloads_exactly(name, pipeline, tmp_path):
    net, data = make(name), sparse(karate()) if pipeline == "advanced" else karate()
    run = quantize(net, [data], pipeline=pipeline, options=SHORT, weight_bits=4, activation_bits=4, **CPU)
    run.save(tmp_path / "quantized.ckpt")
    untrained = make(name)
    for parameter in untrained.parameters():
        parameter.data.normal_()
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=untrained)
    assert torch.equal(loaded(data), run.module(data))
    assert list(loaded.network.layers) == list(run.module.network.layers)


def test_a_layer_of_message_passing_is_one_unit_and_is_reconstructed():
    net, data = make("gat"), whole(karate())
    options = {"adaquant": {"iterations": 60, "batch_size": 8}}
    run = quantize(net, [data], options=options, weight_bits=3, activation_bits=6, edge_bits=None, **CPU)
    (stage,) = [stage for stage in run.stages if stage.name == "AdaQuant"]
    assert stage.figures["units"] == 2 and stage.figures["error_after"] < 0.97 * stage.figures["error_before"]


def test_ranges_of_nodes_and_edges_are_those_of_their_own_values():
    module = calibrated(make("sage"), whole(karate()), per_token=True, activation_bits=4).module
    quantizer = module.network.layers["first.aggregates"].input_quantizers[0]
    x = torch.randn(5, 34, generator=torch.Generator().manual_seed(0))
    alone = quantizer(x)
    x[3] *= 50
    torch.testing.assert_close(quantizer(x)[:3], alone[:3])


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "xnnpack"])
def test_engines_refuse_messages_by_the_name_of_the_layer(target):
    with pytest.raises(ValueError, match=rf"first.factor_\w+: no engine .* target='{target}' .* target=None"):
        calibrated(make("gcn"), karate(), target=target)


def test_weights_alone_have_a_target_and_files_say_what_they_cannot_hold(tmp_path):
    run = calibrated(make("gcn"), karate(), target="weights", activation_bits=None)
    assert list(run.module.network.layers) == ["first.lin", "second.lin"]
    with pytest.raises(ValueError, match=r"GraphNet.forward takes a Data as a whole"):
        export_onnx(run.module, tmp_path / "model.onnx", karate())
    whole_run = calibrated(make("gin"), karate())
    with pytest.raises(ValueError, match=r"first.messages: no engine .* an ONNX file"):
        export_onnx(whole_run.module, tmp_path / "model.onnx", karate())
    export_packed(whole_run.module, tmp_path / "model.safetensors")
    loaded = load_packed(tmp_path / "model.safetensors", make("gin"))
    with torch.no_grad():
        assert torch.equal(loaded(karate()), whole_run.module(karate()))


def test_a_lazy_layer_must_have_run():
    with pytest.raises(ValueError, match=r"first.lin.weight of GraphNet is not initialized yet: run the model on one"):
        QuantizationModule(GraphNet(gnn.GCNConv(-1, 8), gnn.GCNConv(8, 4)))
    net = GraphNet(gnn.GCNConv(-1, 8), gnn.GCNConv(8, 4)).eval()
    net(karate())
    assert "first.lin" in calibrated(net, karate()).module.network.layers


def test_the_package_needs_no_pytorch_geometric():
    code = (
        "import sys; sys.modules['torch_geometric'] = None; import torch, lightning_calibtip as c\n"
        "net = torch.nn.Sequential(torch.nn.Linear(2, 2)); x = torch.ones(4, 2)\n"
        "run = c.quantize(net, [x], pipeline='calibrate', trainer_options={'accelerator': 'cpu'})\n"
        "assert list(run.module.network.layers) == ['0']\n"
        "assert not [name for name in sys.modules if name.startswith('torch_geometric.')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
