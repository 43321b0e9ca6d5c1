"""Histograms of the layers that lose most."""

import pytest
import torch

from lightning_calibtip.quantization.observers import HistogramObserver
from lightning_calibtip.report.histograms import histograms_item
from lightning_calibtip.report.layers import layers_item
from tests import transformer_models as models
from tests.networks import calibrated_network, calibration_set
from tests.report.branches import Branches


def test_the_worst_layers_come_first_and_ranges_are_those_of_the_quantizers(tiny_resnet, images):
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, *images.split(16)))
    names = list(network.layers)
    for place, layer in enumerate(network.layers.values()):
        layer.errors = (1.0, place / 10)
    item = histograms_item(network, layers=2)
    assert [row[0] for row in item.rows] == [names[-1], names[-1], names[-2], names[-2]]
    layer = network.layers[names[-1]]
    weight, given = item.rows[0], item.rows[1]
    assert weight[3] == pytest.approx(float(layer.weight.detach().min()))
    assert weight[2] == layer.config.bit_widths.weight
    quantizer = layer.input_quantizers[0]
    spec = quantizer.spec
    assert given[5] == pytest.approx(float((spec.qmin - quantizer.zero_point) * quantizer.scale))
    assert given[6] == pytest.approx(float((spec.qmax - quantizer.zero_point) * quantizer.scale))
    observer = layer.tensors[0].observer
    assert isinstance(observer, HistogramObserver) and given[4] == pytest.approx(float(observer.row[2]))
    figure = item.draw()
    assert len(figure.axes) == 4 and all(axes.get_xlabel() == "value" for axes in figure.axes)


def test_layers_without_weight_or_input_are_drawn(tmp_path):
    net = models.bert()
    batches = models.batches_of(models.padded_tokens())
    calibration = calibration_set(net)
    calibration.forward = lambda batch, index: net(**batch)
    calibration.batches.extend(batches)
    network = calibrated_network(net, calibration, "minmax")
    item = layers_item(network)
    bits = {row[0]: row[3:5] for row in item.rows}
    assert bits["bert.encoder.layer.0.attention.self.query_key_product"] == [None, 4]
    assert bits["bert.embeddings.word_embeddings"] == [8, None]
    for shown in (item, histograms_item(network, 30)):
        shown.save(tmp_path)
        assert (tmp_path / f"{shown.name}.png").stat().st_size > 5_000


def test_a_shared_quantizer_is_shown_once_with_its_readers():
    branches = Branches().eval()
    network = calibrated_network(branches, calibration_set(branches, torch.randn(8, 4)), edge_bits=None)
    item = histograms_item(network)
    assert sorted(row[0] for row in item.rows if row[1] == "weight") == ["left", "right"]
    (given,) = (row for row in item.rows if row[1] != "weight")
    assert given[1] == "input (read by left, right)" and given[2] == 4
    titles = [axes.get_title() for axes in item.draw().axes]
    assert titles[1].endswith("input, also of 1 other layer") and titles[3].endswith("input, shown above")


def test_layers_that_read_a_tensor_in_different_formats_show_it_twice():
    branches = Branches().eval()
    calibration = calibration_set(branches, torch.randn(8, 4))
    network = calibrated_network(branches, calibration, edge_bits=None, overrides={"right": 8})
    given = [row for row in histograms_item(network).rows if row[1] != "weight"]
    assert sorted(row[1:3] for row in given) == [["input", 4], ["input", 8]]


def test_what_is_in_float_is_shown_without_a_range(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, images)
    network = calibrated_network(tiny_resnet, calibration, edge_bits=None, activation_bits=None, group_size=32)
    item = histograms_item(network)
    assert {tuple(row[1:3]) for row in item.rows} == {("weight in groups of 32", 4), ("input", None)}
    assert all(row[5:] == [None, None] and row[3] <= row[4] for row in item.rows if row[1] == "input")
    axes = item.draw().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["range of the widest group"]


def test_layers_whose_weight_is_in_float_show_it_without_a_range(tiny_resnet, images):
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images), edge_bits=None, weight_bits=None)
    item = histograms_item(network)
    weights = [row for row in item.rows if row[1] == "weight"]
    assert len(weights) == 6 and all(row[2] is None and row[5:] == [None, None] for row in weights)
    assert item.draw().axes[0].get_legend() is None
