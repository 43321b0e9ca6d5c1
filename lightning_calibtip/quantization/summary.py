"""What has become of each layer of a model, as lines of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.utils import parametrize

from .layers import INPUT_QUANTIZERS

if TYPE_CHECKING:
    from .network import QuantizedNetwork

# What quantization itself adds to a layer.
_OWN_MODULES = (*(f".{name}" for name in INPUT_QUANTIZERS), ".parametrizations.weight", ".parametrizations.weight.0")


@dataclass(frozen=True)
class LayerSummary:
    """One line: ``kind`` is ``"quantized"``, ``"folded"`` or ``"float"``.

    The weight's bits are None where there is no weight, those of the activation where no input is quantized.
    """

    name: str
    type: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    parameters: int
    note: str


def summarize(network: QuantizedNetwork) -> list[LayerSummary]:
    """What has become of each layer, each BatchNorm and each other matrix product, in the order of execution."""
    order = list(network.structure.calls_of) if network.structure else []
    folded = {fold.normalization: f"into {fold.layer}" for fold in network.folds}
    lines = []
    for name, module in network.model.named_modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if name in network.layers:
            lines.append(_quantized(network, name))
        elif name in folded:
            lines.append(_line(network, name, "folded", 0, folded[name]))
        elif name in network.floats or name in network.left:
            lines.append(_line(network, name, "float", own, network.floats.get(name) or network.left[name]))
        elif name in network.float_products:
            lines.append(_line(network, name, "float", own, network.float_products[name]))
        elif own and not name.endswith(_OWN_MODULES):
            waiting = name in network.candidates and not network.prepared
            note = "not calibrated yet" if waiting else "not a quantizable type of layer"
            lines.append(_line(network, name, "float", own, note))
    return sorted(lines, key=lambda line: order.index(line.name) if line.name in order else len(order))


def _quantized(network: QuantizedNetwork, name: str) -> LayerSummary:
    layer = network.layers[name]
    weight_bits, activation_bits = layer.acting(layer.bits)
    note = network.notes.get(name, "")
    if layer.tied_to is not None:
        weight_bits, note = layer.tied_to.bits[0], f"with the weight of {layer.tied_to.name}"
    return _line(network, name, "quantized", layer.weight.numel(), note, weight_bits, activation_bits)


def _line(
    network: QuantizedNetwork,
    name: str,
    kind: str,
    parameters: int,
    note: str,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
) -> LayerSummary:
    module = network.model.get_submodule(name)
    cls = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    return LayerSummary(name, cls.__name__, kind, weight_bits, activation_bits, parameters, note)
