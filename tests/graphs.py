"""Graph networks and graphs for tests; importing it skips the tests where PyTorch Geometric is missing."""

import pytest
import torch
from torch import nn

pytest.importorskip("torch_geometric")

from torch_geometric import nn as gnn
from torch_geometric.data import Data
from torch_geometric.datasets import KarateClub


def karate() -> Data:
    """Zachary's club: 34 nodes, 4 classes, 4 nodes for training; it is built into the library."""
    return KarateClub()[0]


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


class GraphNet(nn.Module):
    """Two layers of message passing, over a graph as a whole."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, data: Data) -> torch.Tensor:
        adjacency = data.adj_t if "adj_t" in data else data.edge_index
        return self.second(self.first(data.x, adjacency).relu(), adjacency)


NETS = {
    "gcn": lambda: GraphNet(gnn.GCNConv(34, 16), gnn.GCNConv(16, 4)),
    "gat": lambda: GraphNet(gnn.GATConv(34, 4, heads=2), gnn.GATConv(8, 4)),
    "gin": lambda: GraphNet(gnn.GINConv(mlp(34, 8)), gnn.GINConv(mlp(8, 4))),
    "sage": lambda: GraphNet(gnn.SAGEConv(34, 8), gnn.SAGEConv(8, 4)),
    "edge": lambda: GraphNet(gnn.EdgeConv(mlp(68, 8)), gnn.EdgeConv(mlp(16, 4))),
    "transformer": lambda: GraphNet(gnn.TransformerConv(34, 8), gnn.TransformerConv(8, 4)),
}


def make(name: str) -> GraphNet:
    torch.manual_seed(0)
    return NETS[name]().eval()
