import pytest
import torch
from torch import nn

from lightning_calibtip.allocation.costs import (
    activation_bytes,
    bit_operations,
    latencies,
    measure_work,
    open_candidates,
    read_latencies,
    weight_bytes,
    weight_ratios,
)
from tests.networks import calibrated_network, calibration_set


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.twice = nn.Linear(8, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = self.grouped(self.first(x)).mean((2, 3))
        return self.last(self.twice(self.twice(x)))


@pytest.fixture
def prepared():
    net = Net().eval()
    calibration = calibration_set(net, torch.randn(6, 3, 10, 10))
    return calibrated_network(net, calibration, overrides={"last": None}), calibration


def test_work_is_counted_a_sample_over_all_calls(prepared):
    work = measure_work(*prepared)
    operations = {name: w.multiply_accumulates for name, w in work.items()}
    assert operations == {
        "first": 10 * 10 * 8 * 3 * 9,
        "grouped": 5 * 5 * 8 * 2 * 9,
        "twice": 2 * 8 * 8,
        "last": 8 * 5,
    }
    elements = {name: w.input_elements for name, w in work.items()}
    assert elements == {"first": 3 * 100, "grouped": 8 * 100, "twice": 16, "last": 8}


def test_costs_of_fixed_and_float_layers_are_their_own(prepared):
    network, calibration = prepared
    options = open_candidates(network, [(2, 4), (4, 8)])
    assert options == {"first": [(8, 8)], "grouped": [(2, 4), (4, 8)], "twice": [(2, 4), (4, 8)], "last": [(32, 32)]}
    work = measure_work(network, calibration)
    assert weight_bytes(network, options)["first"] == {(8, 8): 216}
    assert weight_bytes(network, options)["twice"] == {(2, 4): 16, (4, 8): 32}
    assert weight_bytes(network, options)["last"] == {(32, 32): 160}
    assert bit_operations(work, options)["twice"] == {(2, 4): 1024, (4, 8): 4096}
    assert bit_operations(work, options)["last"] == {(32, 32): 40 * 1024}
    assert activation_bytes(work, options)["grouped"] == {(2, 4): 400, (4, 8): 800}
    ratios = weight_ratios(network, options)
    whole = 216 + 144 + 64 + 40
    assert ratios["grouped"][4, 8] == pytest.approx(144 * 4 / 32 / whole)
    assert ratios["last"][32, 32] == pytest.approx(40 / whole)


def test_latency_tables_may_name_widths_or_pairs(prepared, tmp_path):
    options = open_candidates(prepared[0], [(2, 2), (4, 8)])
    table = {"first": {8: 1.5}, "grouped": {2: 0.5, (4, 8): 1}, "twice": {"2": 0.5, (2, 2): 0.25, (4, 8): 2}}
    del table["twice"]["2"]
    costs = latencies(table, options)
    assert costs["grouped"] == {(2, 2): 0.5, (4, 8): 1.0} and costs["first"] == {(8, 8): 1.5}
    assert costs["last"] == {(32, 32): 0.0}
    path = tmp_path / "latency.csv"
    lines = [f"{n},{w},{a},{v}" for n, of in costs.items() for (w, a), v in of.items()]
    path.write_text("\n".join(["layer,weight_bits,activation_bits,latency", *lines]))
    assert read_latencies(path) == costs


def test_a_float_layer_s_latency_counts(prepared):
    options = open_candidates(prepared[0], [(4, 4), (8, 8)])
    table = {name: {"4": 1.0, 8: 2.0} for name in ("first", "grouped", "twice")}
    assert latencies({**table, "last": {32: 7.0}}, options)["last"] == {(32, 32): 7.0}
    with pytest.raises(ValueError, match=r"latency_table lacks 'last' at .* \[\(32, 32\)\]"):
        latencies({**table, "last": {8: 7.0}}, options)


def test_an_unknown_or_missing_layer_of_a_latency_table_is_named(prepared, tmp_path):
    options = open_candidates(prepared[0], [(2, 2), (4, 8)])
    with pytest.raises(ValueError, match="'conv9' is no quantizable layer; these are: first, grouped"):
        latencies({"conv9": {8: 1.0}}, options)
    with pytest.raises(ValueError, match=r"latency_table lacks 'first' at .* \[\(8, 8\)\]"):
        latencies({}, options)
    path = tmp_path / "latency.csv"
    path.write_text("layer,weight_bits,activation_bits,latency\nfirst,8,8,1\nfirst,8,8,fast\n")
    with pytest.raises(ValueError, match="line 3: expected layer"):
        read_latencies(path)
