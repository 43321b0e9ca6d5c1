"""Graphs as calibration batches: their size, which nodes count, finiteness, copies, digests."""

import copy

import pytest
import torch
from torch import nn

from lightning_calibtip import QuantizationModule, quantize, ranks
from lightning_calibtip.batch_arguments import batch_arguments
from lightning_calibtip.batches import batch_size, counted_rows, is_finite, plain
from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.calibration.fingerprint import digest_data
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.files.digest import digest
from tests.graphs import GraphNet, gnn, karate, make

from torch_geometric.data import Batch, Data, HeteroData  # isort: skip
from torch_geometric.loader import DataLoader  # isort: skip

CPU = {"trainer_options": {"accelerator": "cpu"}}


def graph(nodes, generator, features=3):
    edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
    return Data(torch.randn(nodes, features, generator=generator), edges, y=torch.zeros(1))


def hetero():
    data = HeteroData()
    data["user"].x, data["item"].x = torch.ones(5, 2), torch.ones(3, 4)
    data["user", "likes", "item"].edge_index = torch.tensor([[0, 1], [2, 0]])
    return data


def test_samples_are_graphs_of_a_batch_nodes_of_a_graph_training_nodes_or_those_that_were_sampled_for(generator):
    graphs = [graph(nodes, generator) for nodes in (4, 7, 5)]
    assert batch_size(Batch.from_data_list(graphs)) == 3
    assert batch_size(graphs[1]) == 7 and counted_rows(graphs[1]) is None
    assert batch_size(karate()) == int(karate().train_mask.sum()) == 4
    assert batch_size(Batch.from_data_list([karate()])) == 4
    sampled = karate()
    # As a NeighborLoader gives it: the nodes that it was sampled for come first.
    sampled.batch_size = 6
    assert batch_size(sampled) == 6 and counted_rows(sampled).nonzero().flatten().tolist() == list(range(6))
    assert batch_size(hetero()) == 8 and batch_size((graphs[0], torch.ones(2))) == 4


def test_a_mask_for_several_splits_is_refused():
    data = karate()
    data.train_mask = torch.ones(34, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"train_mask of the Data has the shape \(34, 10\), a column for each split"):
        counted_rows(data)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: (data, 1), lambda data: {"graph": data}])
def test_values_that_are_not_finite_are_refused_by_their_name_but_targets_may_be_unknown(wrap, generator):
    data = graph(4, generator)
    calibration = CalibrationSet(lambda batch, index: batch)
    data.y = torch.tensor([float("nan")])
    calibration.append(wrap(data))
    data.x[2, 1] = float("inf")
    with pytest.raises(ValueError, match=r"\['x'\] \(shape \(4, 3\)\) holds NaN or infinity"):
        calibration.append(wrap(data))


def test_sparse_values_are_looked_at():
    for layout in (torch.sparse_coo, torch.sparse_csr):
        dense = torch.eye(3)
        assert is_finite(dense.to_sparse(layout=layout))
        dense[1, 1] = float("nan")
        assert not is_finite(dense.to_sparse(layout=layout))


def test_a_graph_without_training_nodes_is_refused():
    data = karate()
    data.train_mask[:] = False
    with pytest.raises(
        ValueError, match="holds no samples: leave empty batches out of the dataloader, and graphs without"
    ):
        CalibrationSet(lambda batch, index: batch).append(data)


def test_digests_are_of_the_content(generator):
    data, other = graph(4, generator), graph(4, generator)
    sets = [CalibrationSet(lambda batch, index: batch) for _ in range(3)]
    for calibration, batch in zip(sets, (data, copy.deepcopy(data), other), strict=True):
        calibration.append(batch)
    first, second, third = map(digest_data, sets)
    assert first == second != third
    assert digest([hetero()]) == digest([hetero()]) and plain(hetero())["user"]["x"].shape == (5, 2)


def test_a_copy_for_other_processes_leaves_the_batch_where_it_is():
    data = karate().to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        ranks.to_cpu(data)
    data = karate()
    moved = ranks.to_cpu([data, 1])[0]
    assert moved is not data and torch.equal(moved.x, data.x)


class ByName(nn.Module):
    def forward(self, x, edge_index, edge_weight=None):
        return x


class Whole(nn.Module):
    def forward(self, data):
        return data.x


class Named(nn.Module):
    def forward(self, batch):
        return batch.x


class Annotated(nn.Module):
    def forward(self, x: Data):
        return x.x


class Features(nn.Module):
    def forward(self, x):
        return x


class Edges(nn.Module):
    def forward(self, x, edge_attr):
        return x


def test_what_a_forward_takes_of_a_graph():
    data = karate()
    args, kwargs = batch_arguments(ByName(), data)
    assert args == () and list(kwargs) == ["x", "edge_index"] and kwargs["x"] is data.x
    for model in (Whole(), Named(), Annotated()):
        (given,), kwargs = batch_arguments(model, Batch.from_data_list([data]))
        assert kwargs == {} and isinstance(given, Data) and torch.equal(given.x, data.x)
    (given,), _ = batch_arguments(Whole(), data)
    given.x = None
    assert data.x is not None, "a model may write into what it is given"
    assert batch_arguments(Features(), data) == ((), {"x": data.x})
    with pytest.raises(
        ValueError, match=r"a Data of x, edge_index, y, train_mask, has no edge_attr, which Edges.forward"
    ):
        batch_arguments(Edges(), data)


def islands():
    """Two parts without a bridge, of which one is not for training."""
    data = karate()
    other = karate()
    x = torch.cat([data.x, 100 * other.x])
    edges = torch.cat([data.edge_index, other.edge_index + 34], 1)
    mask = torch.cat([torch.ones(34, dtype=torch.bool), torch.zeros(34, dtype=torch.bool)])
    both = Data(x, edges, y=torch.cat([data.y, other.y]), train_mask=mask)
    alone = Data(data.x, data.edge_index, y=data.y, train_mask=mask[:34])
    return alone, both


@pytest.mark.parametrize("name", ["gcn", "gat", "gin", "sage"])
def test_only_training_nodes_count_for_ranges(name):
    alone, both = islands()
    ranges = []
    for data in (alone, both):
        run = quantize(make(name), [data], pipeline="calibrate", weight_bits=4, activation_bits=4, **CPU)
        assert run.calibration_samples == 34
        layers = run.module.network.layers
        ranges.append({name: [q.range() for q in layer.input_quantizers] for name, layer in layers.items()})
    for key, wanted in ranges[0].items():
        # Sums over more edges are made in another order.
        torch.testing.assert_close(ranges[1][key], wanted, rtol=1e-4, atol=1e-6)


def test_only_training_nodes_count_for_losses():
    losses = []
    for data in islands():
        module = quantize(make("gcn"), [data], pipeline="calibrate", weight_bits=4, activation_bits=4, **CPU).module
        calibration = CalibrationSet(module.calibration_step, module.token_mask)
        calibration.append(data)
        losses.append([Loss(module.network, calibration, metric)() for metric in ("kl", "mse")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_only_training_nodes_count_for_the_errors_of_reconstruction():
    errors = []
    for data in islands():
        options = {"adaquant": {"iterations": 1, "holdout": 0.99}}
        run = quantize(make("gcn"), [data], options=options, weight_bits=4, activation_bits=4, **CPU)
        errors += [stage.figures["error_before"] for stage in run.stages if stage.name == "AdaQuant"]
    # All rows but one or two are held out. Those that are not for training have a hundred times the values, and are far
    # out of the ranges.
    assert errors[1] == pytest.approx(errors[0], rel=0.1) and errors[0] < 0.1


def test_batches_of_graphs_go_through_a_pipeline(generator):
    class PerGraph(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = gnn.GINConv(nn.Linear(3, 8)), nn.Linear(8, 2)

        def forward(self, data):
            return self.head(gnn.global_mean_pool(self.conv(data.x, data.edge_index).relu(), data.batch))

    graphs = [graph(nodes, generator) for nodes in (4, 7, 5, 6, 9, 4, 8, 5)]
    options = {"adaquant": {"iterations": 4}, "bias_tuning": {"epochs": 1}}
    run = quantize(
        PerGraph().eval(), DataLoader(graphs, 2), options=options, calibration_samples=6, weight_bits=4, **CPU
    )
    assert run.calibration_samples == 6
    assert [stage.figures["units"] for stage in run.stages if stage.name == "AdaQuant"] == [2]


def test_a_graph_is_no_loader():
    with pytest.raises(TypeError, match=r"calibration must give batches, got a Data, which is one: give a list of it"):
        quantize(make("gcn"), karate(), pipeline="calibrate", **CPU)


def test_a_graph_is_checked_where_a_model_fails_on_it():
    net = GraphNet(gnn.GCNConv(5, 4), gnn.GCNConv(4, 2))
    with pytest.raises(
        RuntimeError, match=r"failed on the first calibration batch \(float32 \(34, 34\), int64 \(2, 156\)"
    ):
        quantize(net, [karate()], pipeline="calibrate", **CPU)
    assert isinstance(QuantizationModule(make("gcn")).inputs_of(karate()), Data)
