"""States of layers that all processes of a run must agree on, and how much work a layer is."""

import math
from collections.abc import Sequence

from .. import ranks
from .layers import QuantizedLayer
from .states import LayerState
from .structure import Structure


def take_states_of_first(layers: Sequence[QuantizedLayer]) -> None:
    """Give the layers, on every rank, the states that they have on rank 0. All ranks must call it.

    Args:
        layers: Layers, in the same order on every rank.

    Example:
        See ``ranks.from_first``.
    """
    if ranks.rank_count() == 1:
        return
    states = [ranks.to_cpu(layer.save().to_dict()) for layer in layers] if ranks.rank() == 0 else []
    for layer, state in zip(layers, ranks.from_first(states), strict=True):
        if ranks.rank() > 0:
            layer.restore(LayerState.from_dict(state))


def work_of(layer: QuantizedLayer, structure: Structure) -> float:
    """About how many multiplications a layer takes for the first calibration batch; at least 1.

    Args:
        layer: The layer.
        structure: As observed of the float model.

    Example:
        See ``ranks.deal``, which deals out tasks by what they cost.
    """
    written = sum(math.prod(value.view[1]) for call in structure.calls_of[layer.name] for value in call.writes[:1])
    weight = layer.weight
    of_one = weight.numel() / weight.shape[layer.channel_axis] if layer.has_weight else 1.0
    return max(1.0, written * of_one)
