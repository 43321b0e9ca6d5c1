"""Status of each layer, as a table and as bit-widths over depth."""

from collections.abc import Mapping
from typing import Any

from ..network.network import QuantizedNetwork
from ..quantization.spec import BitWidths
from .chart import Chart, Series, over_layers
from .drawing import figure_over_layers
from .item import ReportItem
from .reconstruction import WHAT_ERROR_IS

COLUMNS = ("layer", "type", "is", "weight bits", "activation bits", "weights", "error before", "error after", "note")

_NOTE = f"{WHAT_ERROR_IS} A layer of a block has the error of the whole block."


def layers_item(network: QuantizedNetwork) -> ReportItem:
    """Every layer: quantized at which bit-widths and with which error, folded, or float and why.

    Args:
        network: The network, with its present formats.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> network = QuantizedNetwork(nn.Sequential(nn.Linear(2, 3)), QuantizationScheme())
        >>> item = layers_item(network)
        >>> item.title, [row[:3] for row in item.rows]
        ('Layers', [['0', 'Linear', 'float']])
    """
    lines = network.summary()
    rows = []
    for line in lines:
        layer = network.layers.get(line.name)
        errors = (layer.errors if layer is not None else None) or (None, None)
        name = line.name or "(the model itself)"
        rows.append(
            [name, line.type, line.kind, line.weight_bits, line.activation_bits, line.parameters, *errors, line.note]
        )
    bit_widths = {
        line.name: BitWidths(line.weight_bits, line.activation_bits) for line in lines if line.kind == "quantized"
    }

    def draw() -> Any:
        return draw_bit_widths(bit_widths)

    return ReportItem("layers", "Layers", COLUMNS, rows, draw, charts=lambda: bit_width_charts(bit_widths), note=_NOTE)


def bit_width_charts(bit_widths: Mapping[str, BitWidths]) -> list[Chart]:
    """The bit-widths of weights and activations over the layers, for the page; see ``draw_bit_widths``.

    Args:
        bit_widths: Bit-widths by the name of the layer, in the order of execution.

    Example:
        >>> (chart,) = bit_width_charts({"conv1": BitWidths(8, 8), "conv2": BitWidths(4, None)})
        >>> chart.series[1].points
        [(0, 8)]
    """
    weights, activations = ([getattr(of, what) for of in bit_widths.values()] for what in ("weight", "activation"))
    series = [
        Series("weights", over_layers(weights), "bars"),
        Series("activations", over_layers(activations), "points"),
    ]
    return [Chart("Bit-widths", series, list(bit_widths), from_zero=True)]


def draw_bit_widths(bit_widths: Mapping[str, BitWidths]) -> Any:
    """Draw the bit-widths of weights and activations over the layers; what is in float is left out.

    Args:
        bit_widths: Bit-widths by the name of the layer, in the order of execution.

    Returns:
        A matplotlib figure.

    Example:
        >>> figure = draw_bit_widths({"conv1": BitWidths(8, 8), "conv2": BitWidths(4, None)})
        >>> len(figure.axes[0].patches)
        2
    """
    figure, axes = figure_over_layers(list(bit_widths), 2.8)
    weights, activations = {}, {}
    for place, of_layer in enumerate(bit_widths.values()):
        if of_layer.weight is not None:
            weights[place] = of_layer.weight
        if of_layer.activation is not None:
            activations[place] = of_layer.activation
    axes.bar(list(weights), list(weights.values()), 0.8, label="weights")
    if len(set(activations.values())) == 1:
        axes.axhline(next(iter(activations.values())), color="C1", linestyle="--", label="activations, all layers")
    else:
        axes.plot(list(activations), list(activations.values()), "s", color="C1", label="activations", markersize=4)
    axes.set_ylabel("bit-width")
    axes.set_ylim(0, max([*weights.values(), *activations.values()], default=0) + 1)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside upper right", ncols=2)
    return figure
