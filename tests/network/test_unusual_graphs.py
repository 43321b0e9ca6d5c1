"""Graphs and layers of message passing that are used in other ways than the library's own examples."""

import pytest
import torch
from torch import nn

from lightning_calibtip import AdaQuant, quantize
from lightning_calibtip.batch_arguments import batch_arguments
from lightning_calibtip.batches import batch_size, counted_rows, plain
from lightning_calibtip.calibration.calibration_set import attention_mask
from lightning_calibtip.loaders import check_loader
from tests.graphs import GraphNet, gnn, karate, make

from torch_geometric.data import Data  # isort: skip
from torch_geometric.utils import scatter  # isort: skip

CPU = {"trainer_options": {"accelerator": "cpu"}}


def float_names(module):
    return [line.name for line in module.layer_summary() if line.kind == "float"]


class Standardised(gnn.MessagePassing):
    """A pair of numbers, which are no sources and targets, goes along with the features."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)

    def forward(self, x, edge_index):
        x = self.lin(x)
        return self.propagate(edge_index, x=x, moments=(x.mean(), x.std()), bounds=(-3.0, 3.0))

    def message(self, x_j, moments, bounds):
        return ((x_j - moments[0]) / moments[1]).clamp(*bounds)


class Both(gnn.MessagePassing):
    """Messages are two tensors."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)

    def forward(self, x, edge_index):
        return self.propagate(edge_index, x=self.lin(x))

    def message(self, x_j):
        return x_j, x_j.abs()

    def aggregate(self, inputs, index, dim_size=None):
        return scatter(inputs[0] + inputs[1], index, dim=0, dim_size=dim_size)


class Score(gnn.MessagePassing):
    """One number for each node."""

    def __init__(self, inputs):
        super().__init__()
        self.lin = nn.Linear(inputs, 1)

    def forward(self, x, edge_index):
        return self.propagate(edge_index, x=self.lin(x)).squeeze(-1)

    def message(self, x_j):
        return x_j


def test_pairs_of_numbers_are_no_sources_and_targets():
    torch.manual_seed(0)
    net = GraphNet(Standardised(34, 8), Standardised(8, 4)).eval()
    options = {"calibration": {"protection_high": 0.2}}
    module = quantize(net, [karate()], pipeline="calibrate", options=options, **CPU).module
    assert {"first.messages", "second.messages"} <= module.network.layers.keys()


def test_messages_that_are_several_tensors_are_named_as_float(caplog):
    torch.manual_seed(0)
    module = quantize(GraphNet(Both(34, 8), Both(8, 4)).eval(), [karate()], pipeline="calibrate", **CPU).module
    assert float_names(module) == ["first", "second"]
    assert "first: what it sends along edges is no single tensor of numbers, and stays float" in caplog.text


def test_units_that_pass_messages_are_not_tried_on_some_of_their_nodes(monkeypatch):
    # On a GPU an edge to a node that is not there ends the process.
    monkeypatch.setattr(
        "lightning_calibtip.reconstruction.unit_data._gives_the_same_by_rows", lambda *args: pytest.fail("tried")
    )
    quantize(make("gcn"), [karate()], options={"adaquant": {"iterations": 2}}, **CPU)


def test_one_number_for_each_node_or_for_a_single_sample_is_reconstructed():
    torch.manual_seed(0)
    net = GraphNet(gnn.GCNConv(34, 8), Score(8)).eval()
    module = quantize(net, [karate()], options={"adaquant": {"iterations": 2}}, **CPU).module
    assert module(karate()).shape == (34,)

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.head = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x * self.gate(x)[:, None])

    options = {"adaquant": {"iterations": 2, "blocks": ["gate"]}}
    assert quantize(Gate().eval(), [torch.randn(1, 4)], options=options, **CPU).module(torch.ones(3, 4)).shape == (3, 2)


def test_the_mask_of_a_graph_inside_of_a_tuple_or_mapping_counts():
    data = karate()
    for batch in (data, (data, data.y), {"graph": data, "y": data.y}):
        assert int(attention_mask(batch).sum()) == batch_size(batch) == 4
    data.train_mask = data.train_mask.nonzero().flatten()
    with pytest.raises(ValueError, match="train_mask of the Data is int64, and must be bool"):
        counted_rows(data)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: (data, data.y), lambda data: {"data": data}])
def test_a_model_may_change_the_graph_that_it_gets(wrap):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = gnn.GCNConv(34, 34)

        def forward(self, data):
            data.x = self.conv(data.x, data.edge_index).relu()
            return data.x

    data = karate()
    features = data.x
    quantize(Changing().eval(), [wrap(data)], pipeline="calibrate", **CPU)
    assert data.x is features


def test_a_mask_of_nodes_is_not_one_of_other_nodes():
    class Bipartite(nn.Module):
        def __init__(self):
            super().__init__()
            self.there, self.back = gnn.SAGEConv((34, 3), 8), gnn.SAGEConv((8, 34), 4)

        def forward(self, x, groups, edges):
            gathered = self.there((x, groups), edges).relu()
            return self.back((gathered, x), edges.flip(0))

    torch.manual_seed(0)
    edges = torch.stack([torch.arange(34).repeat(2), torch.randint(0, 9, (68,))])
    data = Data(x=torch.randn(34, 34), groups=torch.randn(9, 3), edges=edges, train_mask=torch.arange(34) >= 20)
    # Only the last nodes are for training; groups 0 to 8 get messages from all.
    module = quantize(Bipartite().eval(), [data], pipeline="calibrate", **CPU).module
    assert not float_names(module)
    wanted = data.x[edges[0]].amax()
    (messages,) = module.network.layers["there.messages"].input_quantizers
    zero, step = float(messages.zero_point), float(messages.scale)
    assert (messages.spec.qmax - zero) * step == pytest.approx(float(wanted), rel=0.05)


def test_nodes_that_get_no_message_leave_ranges_to_all_messages():
    data = karate()
    data.edge_index = data.edge_index[:, ~data.train_mask[data.edge_index[1]]]
    module = quantize(make("sage"), [data], pipeline="calibrate", **CPU).module
    assert not float_names(module)


class Own:
    """A batch that is no graph and says by ``to_dict`` something of its own."""

    def __init__(self, x):
        self.x = x

    def to_dict(self):
        return {"x": self.x, "sample": "id-17", "me": self}


def test_an_object_that_is_no_graph_goes_in_whole():
    class OfX(nn.Module):
        def forward(self, x):
            return x

    class OfSample(nn.Module):
        def forward(self, sample):
            return sample

    class OfBatch(nn.Module):
        def forward(self, batch=None, x=None):
            return batch

    for kind in (OfX, OfSample, OfBatch):
        args, kwargs = batch_arguments(kind(), Own(torch.ones(2)))
        assert isinstance(args[0], Own) and not kwargs
    # What holds itself is not taken apart for ever.
    own = Own(torch.ones(2))
    assert plain(own)["me"] is own


def test_to_dict_that_is_for_something_else_changes_nothing():
    class Settings:
        def to_dict(self):
            raise NotImplementedError

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x, settings):
            return self.lin(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.settings = Part(), Settings()

        def forward(self, x):
            return self.part(x, self.settings)

    class Loader(list):
        def to_dict(self):
            return {"batch_size": 8}

    loader = Loader([torch.randn(8, 4)])
    check_loader(loader, "calibration")
    assert "part.lin" in quantize(Net().eval(), loader, pipeline="calibrate", **CPU).module.network.layers


def test_errors_by_degree_and_protection_are_refused_where_they_mean_nothing():
    net, batches = nn.Sequential(nn.Linear(4, 2)).eval(), [torch.randn(8, 4)]
    with pytest.raises(ValueError, match="objective='degree' weighs nodes of graphs, and no quantized layer"):
        quantize(net, batches, options={"adaquant": {"objective": "degree"}}, **CPU)
    with pytest.raises(ValueError, match=r"0 <= low <= high <= 1, got low=0.0 and high='0.1'"):
        AdaQuant(protection_high="0.1")


def test_outputs_of_several_kinds_of_nodes_are_compared_one_after_the_other():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.users, self.items = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return {"users": self.users(x), "items": self.items(x[:3])}

    run = quantize(Two().eval(), [torch.randn(8, 4)], options={"adaquant": {"iterations": 2}}, **CPU)
    assert run.module.network.calibrated
