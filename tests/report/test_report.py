import json

import pytest

from lightning_calibtip.report.figures import layer_error_figure, stage_figure
from lightning_calibtip.report.record import StageRecord, peak_rss_bytes, record_table, run_record, write_record
from lightning_calibtip.report.size import model_size
from lightning_calibtip.report.table import layer_table, text_table
from tests.networks import calibrated_network, calibration_set

STAGES = [StageRecord("Calibration", 1.5, 0.8), StageRecord("AdaQuant", 20.0, 0.9, {"step_seconds": 18.0})]


@pytest.fixture
def network(tiny_resnet, images):
    return calibrated_network(tiny_resnet, calibration_set(tiny_resnet, images), weight_bits=3)


@pytest.fixture
def record(network):
    network.layers["head"].errors = (0.5, 0.25)
    return run_record(network, "recipe", "tiny", "top1", 3, 48, 0.95, STAGES)


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
    network = calibrated_network(
        tiny_resnet, calibration_set(tiny_resnet, images), symmetric=True, activation_symmetric=True
    )
    channels = sum(layer.weight_quantizer.scale.numel() for layer in network.layers.values())
    symmetric = model_size(network).quantized_bytes
    for layer in network.layers.values():
        for quantizer in layer.quantizers:
            quantizer.symmetric = False
    assert model_size(network).quantized_bytes - symmetric == 4 * channels


def test_record_has_every_field(record):
    assert record["version"] == 1
    assert (record["recipe"], record["model"], record["metric"], record["seed"]) == ("recipe", "tiny", "top1", 3)
    assert (record["float"], record["calibrated"], record["quantized"]) == (0.95, 0.8, 0.9)
    assert record["stages"][1] == {
        "name": "AdaQuant",
        "seconds": 20.0,
        "metric": 0.9,
        "figures": {"step_seconds": 18.0},
    }
    assert set(record["size"]) == {"float_bytes", "quantized_bytes", "ratio"}
    assert record["calibration_samples"] == 48
    assert len(record["layers"]) == 6
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
