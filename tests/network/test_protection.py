"""Protection of nodes of high in-degree, percentiles by bits, and errors weighed by degree (Degree-Quant)."""

import copy

import pytest
import torch
from torch import nn

from lightning_calibtip import AdaQuant, AdaQuantOptions, Calibration, QuantizationModule, RangeOptions, quantize
from lightning_calibtip.network.edges import Edges
from lightning_calibtip.network.protection import protecting, protection_probabilities
from lightning_calibtip.quantization.observers import make_observer
from lightning_calibtip.quantization.protection import Protection
from lightning_calibtip.quantization.spec import TensorSpec
from lightning_calibtip.reconstruction.objectives import make_objective
from tests.graphs import GraphNet, gnn, karate, make
from tests.networks import as_loader

from torch_geometric.data import Data  # isort: skip

CPU = {"trainer_options": {"accelerator": "cpu"}}
ALL = Protection(1.0, 1.0)


def star(leaves=200, value=1.0):
    """A hub that all others send to, and a ring of the others."""
    ring = torch.arange(1, leaves + 1)
    edges = torch.stack([ring, torch.zeros_like(ring)])
    edges = torch.cat([edges, torch.stack([ring, ring.roll(1)])], 1)
    x = torch.full((leaves + 1, 3), value)
    return Data(x, edges)


def test_probabilities_grow_with_the_rank_of_the_in_degree():
    degrees = torch.tensor([3, 0, 3, 7, 1])
    # Numbers of nodes with at most as many edges: 4, 1, 4, 5, 2.
    wanted = 0.1 + (0.6 - 0.1) * torch.tensor([4, 1, 4, 5, 2]) / 5
    torch.testing.assert_close(protection_probabilities(degrees, Protection(0.1, 0.6)), wanted)


@pytest.mark.parametrize("low,high", [(-0.1, 0.5), (0.6, 0.5), (0.0, 1.1)])
def test_probabilities_out_of_their_range_are_refused(low, high):
    for options in (RangeOptions, AdaQuantOptions):
        with pytest.raises(ValueError, match=r"0 <= low <= high <= 1"):
            options(protection_low=low, protection_high=high)


def test_edges_of_every_kind_have_the_same_ends():
    dense = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
    wanted = Edges(dense)
    assert wanted.in_degrees().tolist() == [1, 2, 1] and Edges(dense.flip(0), False).in_degrees().tolist() == [1, 2, 1]
    adjacency = torch.sparse_coo_tensor(dense.flip(0), torch.ones(4), (3, 3)).coalesce()
    for found in (adjacency, adjacency.to_sparse_csr(), adjacency.to_sparse_csc()):
        pairs = sorted(zip(*(end.tolist() for end in Edges(found).ends), strict=True))
        assert pairs == sorted(zip(*dense.tolist(), strict=True))


def sum_net():
    """Nodes get the sum of what is sent, and nothing else happens."""
    torch.manual_seed(0)
    return GraphNet(gnn.GINConv(nn.Linear(3, 4)), gnn.GINConv(nn.Linear(4, 2))).eval()


def highest(run, name):
    return float(run.module.network.layers[name].input_quantizers[0].range()[1])


@pytest.mark.parametrize("high,wanted", [(0.0, 200.0), (1.0, 1.0)])
def test_a_protected_hub_does_not_set_the_range_of_what_is_aggregated(high, wanted):
    options = {"calibration": {"observer": "minmax", "protection_low": 0.0, "protection_high": high}}
    data = star()
    # The others, of which some are left out as well, are all alike.
    run = quantize(sum_net(), [data], pipeline="calibrate", options=options, activation_bits=8, **CPU)
    assert highest(run, "first.aggregates") == pytest.approx(wanted)
    assert highest(run, "first.messages") == pytest.approx(1.0)


def test_messages_are_protected_by_who_sends_them():
    data = star()
    data.edge_index = torch.cat([data.edge_index, torch.tensor([[0], [1]])], 1)
    data.x[0] = 50.0
    options = {"calibration": {"observer": "minmax", "protection_high": 1.0}}
    run = quantize(sum_net(), [data], pipeline="calibrate", options=options, **CPU)
    assert highest(run, "first.messages") == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["gcn", "gat", "gin", "sage"])
def test_protected_nodes_stay_in_float_inside_and_all_are_quantized_afterwards(name):
    data = karate()
    module = quantize(make(name), [data], pipeline="calibrate", weight_bits=8, activation_bits=3, **CPU).module
    network, layers = module.network, list(module.network.layers.values())
    for layer in layers:
        # Only what is protected is rounded at all.
        layer.set_enabled(layer.name.endswith(("messages", "aggregates")) or ".factor_" in layer.name)
    quantized = module(data)
    generator = torch.Generator().manual_seed(0)
    with protecting(network.model, layers, ALL, generator):
        protected = module(data)
    for layer in layers:
        layer.set_enabled(False)
    assert torch.equal(protected, module(data)) and not torch.equal(protected, quantized)
    for layer in layers:
        layer.set_enabled(layer.name.endswith(("messages", "aggregates")) or ".factor_" in layer.name)
    with protecting(network.model, layers, Protection(0.5, 0.5), generator):
        first, second = module(data), module(data)
    assert not torch.equal(first, second), "nodes are drawn anew at each call"
    assert torch.equal(module(data), quantized)


def test_reconstruction_with_protection_depends_on_the_seed_alone():
    data, states = karate(), []
    for seed in (0, 0, 1):
        options = {"adaquant": {"iterations": 8, "protection_high": 0.5, "holdout": 0.2}, "seed": seed}
        run = quantize(make("gin"), [data], options=options, weight_bits=3, activation_bits=3, **CPU)
        states.append(run.module(data))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_where_there_are_no_nodes_protection_is_refused(make_trainer):
    for stage in (Calibration(protection_high=0.1), AdaQuant(protection_high=0.1)):
        trainer = make_trainer(Calibration(), stage) if isinstance(stage, AdaQuant) else make_trainer(stage)
        with pytest.raises(ValueError, match=rf"{stage.name}: protection_high=0.1 protects nodes of graphs, and no"):
            trainer.fit(QuantizationModule(nn.Sequential(nn.Linear(2, 2))), as_loader(torch.ones(4, 2)))


def test_percentiles_follow_the_bits(generator):
    values = torch.rand(100_000, generator=generator)
    observer = make_observer(RangeOptions("percentile_by_bits"))
    observer.update(values)
    for bits, cut in ((16, 0.001), (8, 0.001), (6, 10**-2.5), (4, 0.01), (2, 0.01)):
        low, high = observer.compute_range(TensorSpec(bits))
        # The histogram's bins are 1 / 4096 wide, over values from 0 to 1.
        assert float(low) == pytest.approx(float(values.quantile(cut)), abs=3e-4)
        assert float(high) == pytest.approx(float(values.quantile(1 - cut)), abs=3e-4)


def test_the_degree_objective_weighs_nodes_by_their_edges():
    data = star()
    module = quantize(sum_net(), [data], pipeline="calibrate", **CPU).module
    layers = [layer for name, layer in module.network.layers.items() if name.startswith("first.")]
    objective = make_objective("degree", layers)
    output = module.model.first(data.x, data.edge_index)
    degrees = torch.bincount(data.edge_index[1], minlength=201).float()
    torch.testing.assert_close(objective.row_weights(output), 0.5 + 0.5 * degrees / degrees.mean())
    assert objective.row_weights(output[:3]) is None, "rows that are no nodes weigh alike"
    assert make_objective("squared_error", layers).row_weights(output) is None


def test_errors_of_hubs_weigh_more_in_reconstruction():
    data = karate()
    del data.train_mask
    errors = []
    for objective in ("squared_error", "degree"):
        options = {"adaquant": {"iterations": 1, "objective": objective}}
        run = quantize(make("gin"), [copy.copy(data)], options=options, weight_bits=3, activation_bits=3, **CPU)
        errors += [stage.figures["error_before"] for stage in run.stages if stage.name == "AdaQuant"]
    assert errors[0] != pytest.approx(errors[1], rel=1e-3)


def test_where_all_nodes_are_drawn_ranges_are_of_all():
    options = {"calibration": {"observer": "minmax", "protection_low": 1.0, "protection_high": 1.0}}
    run = quantize(sum_net(), [star()], pipeline="calibrate", options=options, **CPU)
    assert not run.module.network.float_layers and highest(run, "first.aggregates") == pytest.approx(200.0)
