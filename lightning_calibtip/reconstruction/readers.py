"""Layers of a block with what they are given and what they return while the float block runs."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..calibration.recording import UnitCall
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from .equalizable import EqualizationOptions
from .objectives import SQUARED_ERROR, make_objective
from .optimize import mean_error
from .unit_data import MiniBatch, UnitDataset
from .units import Unit

# Captured calls that layers of one block are judged by take up to about this many bytes.
_JUDGED_BYTES = 2**28

# Samples that a block is run on at once.
_CHUNK = 16

# Number of values of each channel that ranges are taken from.
_VALUES = 2048


@dataclass
class Reader:
    """A layer that reads the tensor in question: calls to judge it by, and values of its operands, each of shape
    (n, channels), to take ranges from."""

    layer: QuantizedLayer
    unit: Unit
    judging: list[MiniBatch]
    values: list[Tensor]

    def error(self) -> float:
        """Relative error of the layer's output."""
        # Measuring uses targets up, and units may change their arguments.
        objective = make_objective(SQUARED_ERROR, [self.layer])
        return mean_error(self.unit, [objective], (tree_map(_copy, batch) for batch in self.judging))


def readers_of(
    network: QuantizedNetwork, unit: Unit, layers: Sequence[Unit], dataset: UnitDataset, options: EqualizationOptions
) -> list[Reader]:
    """Layers of a unit, with what they are given while the float unit runs.

    Args:
        network: Calibrated network.
        unit: A block, or a single layer.
        layers: The layers, as units of their own.
        dataset: Samples of the unit.
        options: See ``EqualizationOptions``.
    """
    generator = torch.Generator().manual_seed(options.seed)
    index = torch.randperm(dataset.count, generator=generator)[: options.samples]
    half = (len(index) + 1) // 2
    ranging, judging = (index[:half], index[half:]) if len(index) > 1 else (index, index)
    size = 1 if dataset.whole else _CHUNK
    values: dict[str, list[list[Tensor]]] = {layer.name: [] for layer in layers}
    kept: dict[str, list[MiniBatch]] = {layer.name: [] for layer in layers}
    most = -(-_VALUES * size // len(ranging))
    with network.quantized(False):
        for part in ranging.split(size):
            for name, call in _calls(unit, layers, dataset.take(part)):
                rows = []
                for found in _channels_last(network.layers[name], call):
                    chosen = torch.randperm(len(found), generator=generator)[:most].to(found.device)
                    rows.append(found[chosen])
                values[name].append(rows)
        for part in judging.split(size):
            for name, call in _calls(unit, layers, dataset.take(part)):
                kept[name].append(call)
            held = sum(leaf.nbytes for leaf in tree_leaves(kept) if isinstance(leaf, Tensor))
            if held > _JUDGED_BYTES:
                break
    return [
        Reader(
            network.layers[layer.name],
            layer,
            kept[layer.name],
            [torch.cat(parts) for parts in zip(*values[layer.name], strict=True)],
        )
        for layer in layers
        # Not all samples may reach a layer, as one of several experts.
        if values[layer.name] and kept[layer.name]
    ]


def _calls(unit: Unit, layers: Sequence[Unit], batch: MiniBatch) -> list[tuple[str, MiniBatch]]:
    """The calls of a unit's layers while it runs on a mini-batch, with their outputs."""
    found: list[tuple[str, MiniBatch]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call, target = tree_map(_copy, (UnitCall(args, kwargs), output))
            found.append((name, MiniBatch(call, target, None, _counting(batch.importance, target))))

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(watch(layer.name), with_kwargs=True).remove)
        unit(batch.call)
    return found


def _counting(importance: Sequence[Tensor] | None, output: Any) -> list[Tensor] | None:
    """Weights of a unit's output, where a layer's output has the same tokens."""
    if not isinstance(output, Tensor):
        return None
    for weight in importance or ():
        if weight.dim() == output.dim() and weight.shape[:-1] == output.shape[:-1]:
            return [weight.amax(-1, keepdim=True)]
    return None


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _channels_last(layer: QuantizedLayer, batch: MiniBatch) -> list[Tensor]:
    """Values of a layer's operands, shape (n, channels) each; padding left out."""
    floats = [leaf for leaf in tree_leaves(batch.call) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [
        _rows(x, operand.channel_axis, batch.importance)
        for x, operand in zip(floats, layer.type.operands, strict=False)
        if operand.channel_axis is not None
    ]


def _rows(x: Tensor, axis: int, importance: Sequence[Tensor] | None) -> Tensor:
    values = x.detach().float().movedim(axis, -1)
    for weight in importance or ():
        if axis == -1 and weight.dim() == x.dim() and weight.shape[:-1] == x.shape[:-1]:
            return values[(weight > 0).any(-1)]
    return values.reshape(-1, values.shape[-1])
