"""Charts of the page."""

import math
import sys
from itertools import pairwise

import pytest
import torch

from lightning_calibtip.report.chart import HEIGHT, Chart, Series, over_layers
from lightning_calibtip.report.histograms import histograms_item
from lightning_calibtip.report.layers import layers_item
from tests.networks import calibrated_network, calibration_set


def test_layers_share_the_width_and_keep_room_for_their_names():
    names = [f"encoder.layer.{i}.attention.output.dense" for i in range(160)]
    chart = Chart("bits", [Series("weights", over_layers([4.0] * 160), "bars")], names, from_zero=True)
    places = [chart.x(place) for place in range(160)]
    assert places == pytest.approx([(i + 0.5) / 1.6 for i in range(160)], abs=1e-3)
    assert chart.least_width >= 160 * 12, "a line of text needs so much"
    assert len(set(chart.layer_labels)) == 160 and max(map(len, chart.layer_labels)) < 30
    assert chart.y(0) == chart.bottom > chart.y(2) > chart.y(4) > 0


def test_a_logarithmic_axis_has_whole_powers_and_a_place_for_zero():
    chart = Chart(
        "error", [Series("before", [(0, 3e-3), (1, 0.0), (2, math.nan), (3, 0.5)], "line")], list("abcd"), log=True
    )
    assert [text for _, text in chart.y_ticks] == ["1", "0.1", "0.01", "0.001"]
    heights = [place for place, _ in chart.y_ticks]
    assert heights == sorted(heights) and chart.y(0.0) == heights[-1] <= HEIGHT
    steps = [b - a for a, b in pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.11)
    assert len(chart.polyline(chart.series[0]).split()) == 3, "what is not finite is left out"


@pytest.mark.parametrize("values", [[0.5], [0.0], [-1.0, -1.0], [1e-30, 1e30]])
@pytest.mark.parametrize("log", [True, False])
def test_odd_values_are_drawn_inside_the_chart(values, log):
    chart = Chart("odd", [Series("", [(value, value) for value in values], "points")], log=log)
    places = [(chart.x(value), chart.y(value)) for value in values]
    assert all(0 <= x <= 100 and 0 <= y <= HEIGHT for x, y in places)
    assert all(0 <= place <= HEIGHT for place, _ in chart.y_ticks) and len(chart.x_ticks) <= 7


def test_histograms_count_every_weight_and_mark_the_range(tiny_resnet, images):
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images))
    weight, given, *_ = histograms_item(network, layers=1).drawn_charts
    (layer,) = (
        layer for layer in network.layers.values() if weight.title.startswith(f"{layer.name}: number of weights")
    )
    points = weight.series[0].points
    assert sum(count for _, count in points) == layer.weight.numel()
    assert points[0][0] == pytest.approx(float(layer.weight.detach().min())) and points[-1][1] == 0
    quantizer = layer.input_quantizers[0]
    assert given.marks == pytest.approx([float(end.min()) for end in quantizer.range()])
    assert weight.outline(weight.series[0]).startswith("M") and len(points) == 61


def test_layers_of_the_network_are_drawn_without_matplotlib(tiny_resnet, images, monkeypatch):
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images), weight_bits=None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (chart,) = layers_item(network).drawn_charts
    weights, activations = chart.series
    assert weights.points == [] and len(activations.points) == len(network.layers)
    assert list(chart.layers) == list(network.layers)
    assert torch.tensor(activations.points)[:, 1].tolist() == [8, 4, 4, 4, 4, 8]
