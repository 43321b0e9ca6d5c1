"""The edges that a layer of message passing is passing something along, and the in-degrees of its nodes."""

from typing import Any

import torch
from torch import Tensor

# Attribute of a layer, from its call of ``propagate`` to the end of its ``forward``.
_EDGES = "_edges_at_work"


class Edges:
    """Edges of a graph, of whatever kind PyTorch Geometric takes.

    Args:
        edge_index: Shape (2, edges), or a sparse adjacency whose rows are the nodes that get messages.
        source_first: Whether the first row of a dense ``edge_index`` holds the nodes that send.
        bipartite: Whether these are other nodes than those that get messages.
        targets: Number of nodes that get messages; None if only the edges tell of them.

    Example:
        >>> edges = Edges(torch.tensor([[0, 1, 2], [1, 2, 2]]))
        >>> edges.in_degrees().tolist(), edges.count
        ([0, 1, 2], 3)
    """

    def __init__(
        self, edge_index: Any, source_first: bool = True, bipartite: bool = False, targets: int | None = None
    ) -> None:
        self._edge_index, self._source_first, self._bipartite = edge_index, source_first, bipartite
        self._targets = targets
        self._ends: tuple[Tensor, Tensor] | None = None
        # What a protection has drawn, see ``protecting``.
        self.protected: Tensor | None = None

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The nodes that send and those that get each message, int64, shape (edges,) each."""
        if self._ends is None:
            self._ends = self._find_ends()
        return self._ends

    @property
    def senders(self) -> Tensor:
        """The node that each message is told by: the one that sends it, or, where senders are other nodes than
        receivers, the one that gets it."""
        source, target = self.ends
        return target if self._bipartite else source

    @property
    def count(self) -> int:
        """Number of edges."""
        return len(self.ends[0])

    @property
    def nodes(self) -> int:
        """Number of nodes that get messages, as far as the edges name them; others may follow."""
        ends = self.ends[1:] if self._bipartite else self.ends
        return 1 + max((int(end.max()) for end in ends if len(end)), default=-1)

    def are_of(self, tokens: Tensor) -> bool:
        """Whether a mask of a graph's nodes, shape (nodes,), is one of the nodes of these edges: not where senders are
        other nodes than receivers, nor in a pooled graph."""
        if tokens.dim() != 1 or self._bipartite:
            return False
        return len(tokens) >= self.nodes if self._targets is None else len(tokens) == self._targets

    def in_degrees(self) -> Tensor:
        """Number of messages that each node gets, int64, shape (nodes,)."""
        return torch.bincount(self.ends[1], minlength=self.nodes)

    def _find_ends(self) -> tuple[Tensor, Tensor]:
        found = self._edge_index
        if isinstance(found, Tensor) and found.layout == torch.strided:
            first, second = found.as_subclass(Tensor)
            return (first, second) if self._source_first else (second, first)
        if isinstance(found, Tensor):
            # Its order is that of the messages. Whoever has a sparse adjacency of a graph has the library.
            from torch_geometric.utils import to_edge_index

            target, source = to_edge_index(found)[0]
            return source, target
        # A SparseTensor of torch_sparse.
        target, source, _ = found.coo()
        return source, target


def begin_edges(layer: Any, edge_index: Any, bipartite: bool = False, targets: int | None = None) -> None:
    """Note the edges that a layer goes on to pass messages along.

    Example:
        >>> layer = torch.nn.Identity()
        >>> begin_edges(layer, torch.tensor([[0], [1]]))
        >>> edges_of(layer).count
        1
    """
    source_first = getattr(layer, "flow", "source_to_target") == "source_to_target"
    layer.__dict__[_EDGES] = Edges(edge_index, source_first, bipartite, targets)


def end_edges(layer: Any) -> None:
    """Forget the edges of a layer.

    Example:
        >>> end_edges(torch.nn.Identity())
    """
    layer.__dict__.pop(_EDGES, None)


def edges_of(layer: Any) -> Edges | None:
    """The edges that a layer is passing messages along; None while it does not.

    Example:
        >>> edges_of(torch.nn.Identity()) is None
        True
    """
    found: Edges | None = layer.__dict__.get(_EDGES)
    return found
