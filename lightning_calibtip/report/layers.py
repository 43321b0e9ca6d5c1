"""What has become of each layer, as a table and as bits over depth."""

from typing import Any

from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits
from .drawing import figure_over_layers
from .exhibit import Exhibit

COLUMNS = ("layer", "type", "is", "weight bits", "activation bits", "weights", "error before", "error after", "note")


def layers_exhibit(network: QuantizedNetwork) -> Exhibit:
    """Every layer: quantized at which widths and with which error, folded, or float and why."""
    rows = []
    for line in network.summary():
        layer = network.layers.get(line.name)
        errors = (layer.errors if layer is not None else None) or (None, None)
        name = line.name or "(the model itself)"
        rows.append(
            [name, line.type, line.kind, line.weight_bits, line.activation_bits, line.parameters, *errors, line.note]
        )

    def draw() -> Any:
        return draw_bits({name: layer.acting(layer.bits) for name, layer in network.layers.items()})

    return Exhibit("layers", COLUMNS, rows, draw)


def draw_bits(bits: dict[str, Bits] | dict[str, tuple[int | None, int | None]]) -> Any:
    """Widths of weights and activations over the layers; None for what a layer has not."""
    figure, axes = figure_over_layers(list(bits), 2.8)
    weights = {place: widths[0] for place, widths in enumerate(bits.values()) if widths[0] is not None}
    activations = {place: widths[1] for place, widths in enumerate(bits.values()) if widths[1] is not None}
    axes.bar(list(weights), list(weights.values()), 0.8, label="weights")
    if len(set(activations.values())) == 1:
        axes.axhline(next(iter(activations.values())), color="C1", linestyle="--", label="activations, all layers")
    else:
        axes.plot(list(activations), list(activations.values()), "s", color="C1", label="activations", markersize=4)
    axes.set_ylabel("width (bits)")
    axes.set_ylim(0, max([*weights.values(), *activations.values()], default=0) + 1)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside upper right", ncols=2)
    return figure
