"""Units of reconstruction: single layers, or blocks found by running the model."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..calibration.recording import UnitCall
from ..network.blocks import find_blocks
from ..network.layer_types import LayerType, reads_indices
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.structure import Activation, Structure

log = logging.getLogger(__name__)

GRANULARITIES = ("layer", "block")


@dataclass(frozen=True)
class Unit:
    """Layers that are optimised together, against one error.

    Args:
        name: Name of the module in the model.
        module: A quantized layer, or a block that holds some.
        layers: Its quantized layers, in the order of execution, with quantized weights, inputs or both. Embeddings are
            not among them, since nothing makes their rows better than rounding to nearest does.
        activation: Activation function that follows and through which the error is measured; None if there is none.

    Example:
        See ``find_units``.
    """

    name: str
    module: nn.Module
    layers: tuple[QuantizedLayer, ...]
    activation: Activation | None

    @property
    def output_token_axes(self) -> tuple[int, ...]:
        """Dimensions of the output that run over tokens."""
        is_layer = len(self.layers) == 1 and self.layers[0].module is self.module
        return self.layers[0].type.output_token_axes if is_layer else LayerType.output_token_axes

    @property
    def is_quantized(self) -> bool:
        """Whether any of its layers is quantized at its present bit-widths."""
        return not all(layer.config.is_float for layer in self.layers)

    @property
    def prefers_channels_last(self) -> bool:
        """Whether the unit holds two-dimensional convolutions, which a CPU computes faster on channels-last tensors."""
        return any(layer.weight.dim() == 4 and layer.weight.device.type == "cpu" for layer in self.layers)

    def __call__(self, call: UnitCall) -> Any:
        """Output of the unit before the activation, as quantized as its layers are at present."""
        return self.module(*call.args, **call.kwargs)

    def output_tensors(self, output: Any) -> list[Tensor]:
        """Floating-point tensors of what the module returned, after the activation that follows."""
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return leaves if self.activation is None else [self.activation(leaf) for leaf in leaves]


def find_units(network: QuantizedNetwork, granularity: str, blocks: Sequence[str] = ()) -> list[Unit]:
    """Units in the order of execution: every quantized layer but embeddings is in exactly one. Weights and inputs that
    are layers of their own, as those of an LSTM, form one with the module that they are parts of; where that is the
    whole model, or does not run by itself, they are left out.

    Args:
        network: Prepared and calibrated network.
        granularity: One of ``GRANULARITIES``: ``"layer"``, or ``"block"`` for the deepest modules in which paths fork
            and join again (BRECQ, Li et al. 2021), and whole layers of transformers; layers outside of these stay units
            of their own.
        blocks: Names or patterns (``fnmatch``) of modules that are to be units whatever ``granularity`` finds in them.

    Raises:
        ValueError: If a name in ``blocks`` matches no module with quantized layers, or two of the modules lie inside
            each other.

    Example:
        >>> import torch
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> network = QuantizedNetwork(model, QuantizationScheme())
        >>> network.prepare(lambda: model(torch.ones(1, 2)))
        >>> [(unit.name, unit.activation is not None) for unit in find_units(network, "layer")]
        [('0', True), ('2', False)]
    """
    structure = network.structure
    assert structure is not None
    layers = {name for name, layer in network.layers.items() if not reads_indices(layer.module)}
    running = [name for name in structure.calls_of if name in layers]
    for name in layers - set(running):
        log.warning("%s does not run in the first calibration batch: it is not reconstructed.", name)

    def inside(parent: str) -> list[str]:
        return [name for name in running if name.startswith(f"{parent}.")]

    named = _named_blocks([name for name in structure.calls_of if inside(name)], blocks)
    found = find_blocks(structure, lambda name: bool(inside(name))) if granularity == "block" else []
    whole = [*named, *_apart_from(found, named)]
    parts = [name for name in running if network.layers[name].type.part]
    whole += _wholes(parts, whole, structure)
    # Of wholes inside each other, the outermost.
    whole = [name for name in whole if not any(name.startswith(f"{other}.") for other in whole)]
    members = {name: inside(name) for name in whole}
    taken = {name for names in members.values() for name in names}
    left = [name for name in running if name not in taken and not network.layers[name].type.between_layers]
    for name in [name for name in left if name in parts]:
        log.info("%s belongs to no module that could be a unit: it is not reconstructed.", name)
    alone = [name for name in left if name not in parts]
    names = {**members, **{name: [name] for name in alone}}
    return [
        Unit(
            name,
            network.model.get_submodule(name),
            tuple(network.layers[layer] for layer in names[name]),
            structure.activation_after(name),
        )
        for name in structure.calls_of
        if name in names
    ]


def _wholes(parts: Sequence[str], blocks: Sequence[str], structure: Structure) -> list[str]:
    """The innermost modules that run around parts outside of the blocks, and hold none of these."""
    found: dict[str, None] = {}
    for part in parts:
        owner = part.rpartition(".")[0]
        while owner and owner not in structure.calls_of:
            owner = owner.rpartition(".")[0]
        around = any(part.startswith(f"{block}.") or block.startswith(f"{owner}.") for block in blocks)
        if owner and not around:
            found[owner] = None
    return list(found)


def _named_blocks(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Modules among ``names`` that the patterns match."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"blocks: {pattern!r} matches no module that runs and holds quantized layers; these are: "
                f"{', '.join(filter(None, names)) or 'none'}."
            )
    matched = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for name in matched:
        if outer := next((other for other in matched if name.startswith(f"{other}.")), None):
            raise ValueError(f"blocks: {name} lies inside {outer}; name one of them.")
    return matched


def _apart_from(found: Sequence[str], named: Sequence[str]) -> list[str]:
    """The found blocks that neither lie inside a named one nor hold one."""
    return [
        name
        for name in found
        if not any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in named)
    ]
