"""Units of reconstruction: single layers, or blocks found by running the model."""

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calibration.replay import UnitCall
from ..quantization.layers import QuantizedLayer
from ..quantization.network import QuantizedNetwork
from ..quantization.structure import Activation

log = logging.getLogger(__name__)

GRANULARITIES = ("layer", "block")


@dataclass(frozen=True)
class Unit:
    """What is optimised together, against one error.

    Args:
        name: Of the module in the model.
        module: A quantized layer, or a block that holds some.
        layers: The quantized layers, in the order of execution.
        activation: The activation function that follows, through which the error is measured.
    """

    name: str
    module: nn.Module
    layers: tuple[QuantizedLayer, ...]
    activation: Activation | None

    def __call__(self, call: UnitCall) -> Any:
        """Output of the unit before the activation, as quantized as its layers are at present."""
        return self.module(*call.args, **call.kwargs)


def find_units(network: QuantizedNetwork, granularity: str) -> list[Unit]:
    """Units in the order of execution: every quantized layer is in exactly one.

    Args:
        network: Prepared and calibrated.
        granularity: ``"layer"``, or ``"block"`` for the deepest modules in which paths fork and join again (BRECQ, Li
            et al. 2021); layers outside of these stay units of their own.

    Raises:
        ValueError: If ``granularity`` is neither.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}.")
    structure = network.structure
    assert structure is not None
    running = [name for name in structure.calls_of if name in network.layers]
    for name in network.layers.keys() - set(running):
        log.warning("%s does not run in the first calibration batch: it is not reconstructed.", name)

    def inside(parent: str) -> list[str]:
        return [name for name in running if name.startswith(f"{parent}.")]

    blocks = structure.blocks(lambda name: bool(inside(name))) if granularity == "block" else []
    members = {block: inside(block) for block in blocks}
    taken = {name for names in members.values() for name in names}
    names = {**members, **{name: [name] for name in running if name not in taken}}
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
