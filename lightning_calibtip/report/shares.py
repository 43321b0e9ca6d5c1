"""Shares of values that quantizers have counted, by tensor."""

from typing import Any

from ..network.network import QuantizedNetwork
from .chart import Chart, Series, over_layers
from .drawing import figure_over_layers
from .item import ReportItem


def shares_item(network: QuantizedNetwork) -> ReportItem | None:
    """Shares that the network's quantizers have counted (zeros and cut values of ``"sparq"``); None if they count
    nothing.

    Args:
        network: The network, after data have passed.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> shares_item(QuantizedNetwork(nn.Sequential(nn.Linear(2, 3)), QuantizationScheme())) is None
        True
    """
    found = {quantizer.name: quantizer.shares() for quantizer in network.quantizers}
    found = {name: shares for name, shares in found.items() if shares}
    if not found:
        return None
    columns = list(dict.fromkeys(key for shares in found.values() for key in shares))
    rows = [[name, *(shares.get(key) for key in columns)] for name, shares in found.items()]
    points = {key: over_layers([shares.get(key) for shares in found.values()]) for key in columns}

    def draw() -> Any:
        figure, axes = figure_over_layers(list(found), 3.0, "tensor")
        for key, values in points.items():
            axes.plot([x for x, _ in values], [y for _, y in values], "o-", label=key, markersize=4)
        axes.set_ylabel("share of the values")
        figure.legend(loc="outside upper right", ncols=len(points))
        return figure

    def charts() -> list[Chart]:
        series = [Series(key, values, "line") for key, values in points.items()]
        return [Chart("Share of the values", series, list(found), from_zero=True)]

    return ReportItem("shares", "Shares of values by tensor", ["tensor", *columns], rows, draw, charts=charts)
