"""GCN, GAT, GIN and SAGE of PyTorch Geometric, in an ordinary LightningModule."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv, global_add_pool
from torchmetrics import R2Score
from torchmetrics.classification import MulticlassAccuracy

ModelName = Literal["gcn", "gat", "gin", "sage"]


def make_layer(name: str, inputs: int, outputs: int) -> nn.Module:
    """A layer of message passing.

    Args:
        name: One of ``ModelName``.
        inputs: Number of features that it reads.
        outputs: Number of features that it gives.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "gcn":
        return GCNConv(inputs, outputs)
    if name == "gat":
        return GATConv(inputs, outputs // 4, heads=4)
    if name == "sage":
        return SAGEConv(inputs, outputs)
    if name == "gin":
        inner = nn.Sequential(
            nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Linear(outputs, outputs)
        )
        return GINConv(inner)
    raise ValueError(f"model must be gcn, gat, gin or sage, got {name!r}.")


class GraphNetwork(pl.LightningModule):
    """Layers of message passing, and a linear layer for each node, or for the sum over each graph; nothing in it knows
    of quantization.

    Args:
        name: Kind of the layers.
        features: Number of features of a node.
        outputs: Number of classes of nodes; 1 for one value of each graph.
        width: Number of features between the layers.
        depth: Number of layers of message passing.
        learning_rate: Learning rate of Adam.
    """

    def __init__(
        self, name: str, features: int, outputs: int, width: int = 16, depth: int = 2, learning_rate: float = 5e-3
    ) -> None:
        super().__init__()
        widths = [features, *[width] * depth]
        self.layers = nn.ModuleList(map(lambda *sizes: make_layer(name, *sizes), widths[:-1], widths[1:]))
        self.head = nn.Linear(width, outputs)
        self.learning_rate, self.is_regression = learning_rate, outputs == 1
        self.metric = R2Score() if outputs == 1 else MulticlassAccuracy(outputs, average="micro")
        self.metric_name = "r2" if outputs == 1 else "accuracy"

    def forward(self, data: Data) -> Tensor:
        """A graph to logits (nodes, classes), or a batch of graphs to values (graphs, 1)."""
        x = data.x
        for layer in self.layers:
            x = F.relu(layer(x, data.edge_index))
        return self.head(global_add_pool(x, data.batch) if self.is_regression else x)

    def training_step(self, data: Data, batch_idx: int) -> Tensor:
        """Squared error of the graphs, or cross entropy of the nodes for training."""
        output = self(data)
        if self.is_regression:
            return F.mse_loss(output.squeeze(1), data.y)
        return F.cross_entropy(output[data.train_mask], data.y[data.train_mask])

    def validation_step(self, data: Data, batch_idx: int) -> None:
        """Compare with the targets."""
        output = self(data)
        if self.is_regression:
            self.metric(output.squeeze(1), data.y)
        else:
            self.metric(output[data.val_mask], data.y[data.val_mask])
        self.log(self.metric_name, self.metric, batch_size=1)

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def train(name: str, loaders: Any, epochs: int, seed: int, accelerator: str = "auto", **options: Any) -> GraphNetwork:
    """Train a network, from weights that the seed gives.

    Args:
        name: Kind of the layers.
        loaders: From ``graph_loaders``.
        epochs: Epochs of training.
        seed: Random seed.
        accelerator: Accelerator of the Trainer.
        options: Further arguments of ``GraphNetwork``.
    """
    pl.seed_everything(seed, verbose=False)
    network = GraphNetwork(name, loaders.features, loaders.outputs, **options)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, loaders.train)
    return network
