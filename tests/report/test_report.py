import copy
import json

import pytest
import torch

from lightning_calibtip.allocation.work import measure_work
from lightning_calibtip.report.figures import layer_error_figure, stage_figure
from lightning_calibtip.report.item import ReportItem
from lightning_calibtip.report.layers import layers_item
from lightning_calibtip.report.record import (
    StageRecord,
    layer_records,
    peak_rss_bytes,
    record_table,
    remove_previous_items,
    run_record,
    write_record,
)
from lightning_calibtip.report.size import BitOperations, bit_operations, model_size
from lightning_calibtip.report.table import layer_table, text_table
from tests.networks import calibrated_network, calibration_set
from tests.report.branches import Branches

STAGES = [
    StageRecord("Calibration", 1.5, 0.8),
    StageRecord("AdaQuant", 20.0, 0.9, {"step_seconds": 18.0}, {"top1": 0.9, "loss": 0.3}, "6 of 6 units were kept."),
]


@pytest.fixture
def network(tiny_resnet, images):
    return calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images), weight_bits=3)


@pytest.fixture
def record(network):
    network.layers["head"].errors = (0.5, 0.25)
    operations = BitOperations(2048.0, 64.0)
    items = ["layers", "histograms"]
    return run_record(network, "recipe", "tiny", "top1", 3, 48, 0.95, STAGES, items, {"top1": 0.95}, None, operations)


def test_size_counts_bits_scales_zero_points_and_what_stays_float(tiny_resnet, images):
    float_numbers = 6 * 9 + 4 * 324 + 6 * 4 + 4 + 5 * (4 * 6)
    network = calibrated_network(
        tiny_resnet, calibration_set(tiny_resnet, images), weight_bits=3, overrides={"head": None}
    )
    size = model_size(network)
    # The counter of batches in each BatchNorm is an int64.
    assert size.float_bytes == 4 * float_numbers + 5 * 8
    weights = 6 * 9 + 4 * ((324 * 3 + 7) // 8)
    qparams = 5 * 2 * 6 + 5 * 2
    biases = 5 * 6
    head = 6 * 4 + 4
    assert size.quantized_bytes == weights + 4 * (qparams + biases + head)
    assert size.ratio == size.quantized_bytes / size.float_bytes


def test_symmetric_weights_need_no_zero_points(tiny_resnet, images):
    sizes, channels = {}, 5 * 6 + 4
    for symmetric in (False, True):
        net = copy.deepcopy(tiny_resnet)
        network = calibrated_network(net, calibration_set(net, images), symmetric=symmetric)
        sizes[symmetric] = model_size(network).quantized_bytes
    assert sizes[False] - sizes[True] == 4 * channels


def test_size_counts_what_is_in_float_of_weight_only_and_of_activation_only_layers(tiny_resnet, images):
    float_weights, bit_weights = 4 * (6 * 9 + 4 * 324 + 24), 6 * 9 // 2 + 4 * 324 // 2 + 24 // 2
    biases = 4 * (5 * 6 + 4)
    for scheme, expected in (
        ({"activation_bits": None}, bit_weights + 4 * 2 * (5 * 6 + 4)),
        ({"weight_bits": None}, float_weights + 4 * 2 * 6),
        # Rows of 9, 54 and 6 weights in groups of 32.
        ({"activation_bits": None, "group_size": 32}, bit_weights + 4 * 2 * (6 * 1 + 4 * 6 * 2 + 4 * 1)),
    ):
        net = copy.deepcopy(tiny_resnet)
        network = calibrated_network(net, calibration_set(net, images), edge_bits=None, **scheme)
        assert model_size(network).quantized_bytes == expected + biases, scheme


def test_a_quantizer_that_layers_share_is_counted_once():
    branches = Branches().eval()
    network = calibrated_network(branches, calibration_set(branches, torch.randn(8, 4)), edge_bits=None)
    assert network.layers["left"].input_quantizers[0] is network.layers["right"].input_quantizers[0]
    qparams = 4 * 2 * (3 + 3 + 1)
    assert model_size(network).quantized_bytes == 2 * (12 // 2) + 4 * 2 * 3 + qparams


def test_bit_operations_are_those_of_each_layers_own_formats(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, images)
    network = calibrated_network(tiny_resnet, calibration, overrides={"blocks.0.conv2": (2, 8), "head": None})
    found = bit_operations(network, measure_work(network, calibration))
    # 48 images of 8 x 8 pixels: the stem has 9 weights for each output, the others 54; the head 6 inputs.
    stem, conv, head = 64 * 6 * 9, 64 * 6 * 54, 24
    assert found.float_operations == 32 * 32 * (stem + 4 * conv + head)
    assert found.quantized_operations == 8 * 8 * stem + (3 * 4 * 4 + 2 * 8) * conv + 32 * 32 * head


def test_record_has_every_field(record):
    assert record["version"] == 1
    assert (record["recipe"], record["model"], record["metric"], record["seed"]) == ("recipe", "tiny", "top1", 3)
    assert (record["float"], record["calibrated"], record["quantized"]) == (0.95, 0.8, 0.9)
    assert record["stages"][1] == {
        "name": "AdaQuant",
        "seconds": 20.0,
        "metric": 0.9,
        "figures": {"step_seconds": 18.0},
        "metrics": {"top1": 0.9, "loss": 0.3},
        "outcome": "6 of 6 units were kept.",
    }
    assert record["metrics"]["loss"] == {
        "float": None, "quantized": 0.3, "higher_is_better": False, "validation_samples": None, "standard_error": None,
    }  # fmt: skip
    assert record["bit_operations"] == {"float": 2048.0, "quantized": 64.0, "ratio": 1 / 32}
    assert record["versions"]["torch"] == torch.__version__ and record["date"].startswith("20")
    assert set(record["size"]) == {"float_bytes", "quantized_bytes", "ratio"}
    assert record["calibration_samples"] == 48
    assert len(record["layers"]) == 6 and record["report_items"] == ["layers", "histograms"]
    assert record["layers"][-1] == {
        "name": "head", "weight_bits": 8, "activation_bits": 8, "parameters": 24,
        "error_before": 0.5, "error_after": 0.25,
    }  # fmt: skip
    assert record["layers"][1]["error_before"] is None
    assert 10**7 < record["peak_rss_bytes"] <= peak_rss_bytes()


def test_record_is_written_whole(record, tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_record(path, record)
    assert json.loads(path.read_text()) == record
    with pytest.raises(TypeError):
        write_record(path, {"bad": object()})
    assert json.loads(path.read_text()) == record
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_only_files_that_the_previous_record_names_are_removed(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside.csv"
    folder.mkdir()
    kept = ["mine.csv", "layers.txt", "sensitivity.csv"]
    for path in (outside, *(folder / name for name in ("layers.csv", "layers.png", *kept))):
        path.touch()
    (folder / "histograms.csv").mkdir()
    write_record(folder / "result.json", {"report_items": ["layers", "gone", "histograms", "../outside", 3]})
    remove_previous_items(folder)
    assert {path.name for path in folder.iterdir()} == {*kept, "histograms.csv", "result.json"} and outside.exists()


@pytest.mark.parametrize(
    "content", [None, "no JSON", "[]", "{}", '{"report_items": "layers"}', '{"report_items": null}']
)
def test_without_a_record_that_names_items_nothing_is_removed(content, tmp_path):
    (tmp_path / "layers.csv").touch()
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    remove_previous_items(tmp_path)
    assert (tmp_path / "layers.csv").exists()


@pytest.mark.parametrize(
    "scheme,weight_bits,activation_bits,note",
    [
        ({"activation_bits": None}, 4, None, ""),
        ({"weight_bits": None}, None, 4, ""),
        ({"activation_bits": None, "group_size": 32}, 4, None, "weights in groups of 32"),
    ],
)
def test_what_is_in_float_has_no_bits_in_tables_and_record(
    scheme, weight_bits, activation_bits, note, tiny_resnet, images, tmp_path
):
    network = calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images), edge_bits=None, **scheme)
    item = layers_item(network)
    row = next(row for row in item.rows if row[0] == "blocks.0.conv1")
    assert item.title == "Layers" and row[3:5] == [weight_bits, activation_bits] and row[-1] == note
    layer = next(layer for layer in layer_records(network) if layer["name"] == "blocks.0.conv1")
    assert (layer["weight_bits"], layer["activation_bits"]) == (weight_bits, activation_bits)
    figure = item.draw()
    assert len(figure.axes[0].patches) == (6 if weight_bits else 0)
    item.save(tmp_path)
    assert (tmp_path / "layers.png").stat().st_size > 5_000
    line = next(line for line in layer_table(network.summary()).splitlines() if line.startswith("head "))
    assert line.split()[3:5] == [str(weight_bits or "-"), str(activation_bits or "-")]


def test_tables_show_stages_and_layers(record, network):
    assert "AdaQuant          20  10.0%           0.9" in record_table(record)
    table = layer_table(network.summary())
    assert "blocks.0.conv1  Conv2d" in table and table.endswith("6 quantized, 5 folded, 0 float")
    assert text_table(["a"], []) == "a\n-"


def test_figures_show_all_bars_and_layers(record):
    bars = stage_figure({"W3A4": record, "W2A4": record}).axes[0]
    assert [text.get_text() for text in bars.get_xticklabels()] == ["float", "Calibration", "AdaQuant"]
    assert len(bars.patches) == 6 and "top1" in bars.get_ylabel()
    lines = layer_error_figure(record).axes[0]
    assert [list(line.get_ydata()) for line in lines.lines] == [[0.5], [0.25]]
    for layer in record["layers"]:
        layer["error_before"] = None
    with pytest.raises(ValueError, match="no reconstructed layer"):
        layer_error_figure(record)


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    rows = [["=1+1", "-x", -1.5], ["@cmd", "+1", 2], ["conv1", "a=b", 3]]
    ReportItem("cells", "Cells", ["=layer", "what", "value"], rows, lambda: None).save(tmp_path)
    lines = (tmp_path / "cells.csv").read_text().splitlines()
    assert lines == ["'=layer,what,value", "'=1+1,'-x,-1.5", "'@cmd,'+1,2", "conv1,a=b,3"]
