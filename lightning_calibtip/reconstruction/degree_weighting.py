"""Reconstruction error of nodes of a graph by their in-degree."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..network.layers import QuantizedLayer
from ..network.message_passing import Aggregates
from .objectives import SquaredError, register_objective

DEGREE = "degree"


@register_objective(DEGREE)
class DegreeWeightedError(SquaredError):
    """Squared error of which half weighs all nodes alike, and half each by its in-degree over the mean of the graph's:
    what goes wrong in a hub is heard by many.

    It counts for units that pass messages and return a row for each node; elsewhere it is the squared error. A model
    without any is refused.

    Args:
        layers: Layers of the unit.

    Example:
        >>> DegreeWeightedError().row_weights(torch.ones(2, 3)) is None
        True
    """

    def __init__(self, layers: Sequence[QuantizedLayer] = ()) -> None:
        super().__init__(layers)
        self._aggregates = [layer.module for layer in self.layers if isinstance(layer.module, Aggregates)]
        for module in self._aggregates:
            module.keeps_degrees = True

    @classmethod
    def check_layers(cls, layers: Sequence[QuantizedLayer]) -> None:
        """See ``Objective``."""
        if not any(isinstance(layer.module, Aggregates) for layer in layers):
            raise ValueError(
                f"objective={DEGREE!r} weighs nodes of graphs, and no quantized layer of the model aggregates "
                "messages: leave objective out."
            )

    def row_weights(self, output: Tensor) -> Tensor | None:
        """See ``Objective``."""
        for module in reversed(self._aggregates):
            degrees = module.degrees
            if degrees is not None and output.dim() and len(degrees) == len(output):
                shares = degrees.float() / degrees.float().mean().clamp_min(torch.finfo(torch.float32).tiny)
                return 0.5 + 0.5 * shares
        return None
