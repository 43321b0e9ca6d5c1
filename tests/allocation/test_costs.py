import math

import pytest
import torch
from torch import nn

from lightning_calibtip.allocation.costs import _COSTS, CostInputs, cost_table, open_candidates
from lightning_calibtip.allocation.latency import latencies, read_latencies
from lightning_calibtip.allocation.work import measure_work
from lightning_calibtip.quantization.spec import BitWidths as B
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


def test_costs_of_pinned_and_float_layers_are_their_own(prepared):
    network, calibration = prepared
    options = open_candidates(network, [B(2, 4), B(4, 8)])
    assert options == {
        "first": [B(8, 8)],
        "grouped": [B(2, 4), B(4, 8)],
        "twice": [B(2, 4), B(4, 8)],
        "last": [B(None, None)],
    }
    inputs = CostInputs(network, calibration, options)
    assert cost_table("weight_bytes", inputs)["first"] == {B(8, 8): 216}
    assert cost_table("weight_bytes", inputs)["twice"] == {B(2, 4): 16, B(4, 8): 32}
    assert cost_table("weight_bytes", inputs)["last"] == {B(None, None): 160}
    assert cost_table("bit_operations", inputs)["twice"] == {B(2, 4): 1024, B(4, 8): 4096}
    assert cost_table("bit_operations", inputs)["last"] == {B(None, None): 40 * 1024}
    assert cost_table("activation_bytes", inputs)["grouped"] == {B(2, 4): 400, B(4, 8): 800}
    ratios = cost_table("compression", inputs)
    whole = 216 + 144 + 64 + 40
    assert ratios["grouped"][B(4, 8)] == pytest.approx(144 * 4 / 32 / whole)
    assert ratios["last"][B(None, None)] == pytest.approx(40 / whole)


def test_weight_only_candidates_cost_32_bits_for_what_they_leave_in_float(prepared):
    network, calibration = prepared
    inputs = CostInputs(network, calibration, open_candidates(network, [B(4, None), B(None, 8)]))
    assert cost_table("weight_bytes", inputs)["twice"] == {B(4, None): 32, B(None, 8): 256}
    assert cost_table("activation_bytes", inputs)["twice"] == {B(4, None): 64, B(None, 8): 16}
    assert cost_table("bit_operations", inputs)["twice"] == {B(4, None): 128 * 4 * 32, B(None, 8): 128 * 32 * 8}


def test_groups_of_weights_cost_their_weights_alone(prepared):
    net = Net().eval()
    calibration = calibration_set(net, torch.randn(6, 3, 10, 10))
    network = calibrated_network(net, calibration, overrides={"last": None}, group_size=4)
    inputs = CostInputs(network, calibration, open_candidates(network, [B(2, 4), B(4, 8)]))
    assert cost_table("weight_bytes", inputs)["twice"] == {B(2, 4): 16, B(4, 8): 32}


def test_a_cost_is_computed_for_the_format_that_a_layer_really_has(images):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    calibration = calibration_set(model, torch.randint(0, 9, (8, 3)))
    network = calibrated_network(model, calibration, edge_bits=None)
    inputs = CostInputs(network, calibration, open_candidates(network, [B(4, 4), B(4, 8)]))
    seen = {}
    inputs.tabulate(lambda name, config: seen.setdefault((name, config.bit_widths), 0.0))
    assert list(seen) == [("0", B(4, None)), ("2", B(4, 4)), ("2", B(4, 8))]


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (lambda inputs: {}, "The cost 'mine' of first at W8A8 is None: the function registered"),
        (lambda inputs: inputs.tabulate(lambda *of: math.nan if of[0] == "twice" else 0.0), "of twice at W2A4 is nan"),
    ],
)
def test_an_incomplete_or_undefined_cost_of_a_user_is_named(prepared, cost, message, monkeypatch):
    monkeypatch.setitem(_COSTS, "mine", cost)
    network, calibration = prepared
    with pytest.raises(ValueError, match=message):
        cost_table("mine", CostInputs(network, calibration, open_candidates(network, [B(2, 4), B(4, 8)])))


def test_latency_tables_may_name_bit_widths_or_pairs(prepared, tmp_path):
    network = prepared[0]
    options = open_candidates(network, [B(2, 2), B(4, None)])
    table = {"first": {8: 1.5}, "grouped": {"2": 0.5, (4, None): 1}, "twice": {(2, 2): 0.25, (4, 32): 2}}
    costs = latencies(table, network, options)
    assert costs["grouped"] == {B(2, 2): 0.5, B(4, None): 1.0} and costs["first"] == {B(8, 8): 1.5}
    assert costs["twice"] == {B(2, 2): 0.25, B(4, None): 2.0}
    assert costs["last"] == {B(None, None): 0.0}
    for cell in ("", 32):
        path = tmp_path / "latency.csv"
        lines = [f"{n},{b.weight or cell},{b.activation or cell},{v}" for n, of in costs.items() for b, v in of.items()]
        path.write_text("\n".join(["layer,weight_bits,activation_bits,latency", *lines]))
        assert read_latencies(path) == costs
        assert latencies(read_latencies(path), network, options) == costs


def test_one_number_in_a_latency_table_stands_for_what_the_scheme_and_the_layer_quantize():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    calibration = calibration_set(model, torch.randint(0, 9, (8, 3)))
    table = {"0": {4: 1.0, 8: 2.0}, "2": {4: 3.0, 8: 4.0}}
    network = calibrated_network(model, calibration, activation_bits=None)
    assert latencies(table, network, open_candidates(network, [B(4, None)])) == {
        "0": {B(8, None): 2.0},
        "2": {B(8, None): 4.0},
    }
    other = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    network = calibrated_network(other, calibration_set(other, torch.randint(0, 9, (8, 3))), edge_bits=None)
    # The embedding has no input: its weight's bits alone tell its formats apart.
    assert latencies(table, network, {"0": [B(4, 6)], "2": [B(8, 8)]}) == {"0": {B(4, 6): 1.0}, "2": {B(8, 8): 4.0}}


def test_a_float_layer_s_latency_counts(prepared):
    network = prepared[0]
    options = open_candidates(network, [B(4, 4), B(8, 8)])
    table = {name: {"4": 1.0, 8: 2.0} for name in ("first", "grouped", "twice")}
    for key in (32, "32", (32, 32), None, B(None, None)):
        assert latencies({**table, "last": {key: 7.0}}, network, options)["last"] == {B(None, None): 7.0}
    with pytest.raises(ValueError, match="latency_table lacks 'last' at float"):
        latencies({**table, "last": {8: 7.0}}, network, options)


def test_an_unknown_or_missing_layer_of_a_latency_table_is_named(prepared, tmp_path):
    network = prepared[0]
    options = open_candidates(network, [B(2, 2), B(4, 8)])
    with pytest.raises(ValueError, match="'conv9' is no quantizable layer; these are: first, grouped"):
        latencies({"conv9": {8: 1.0}}, network, options)
    with pytest.raises(ValueError, match="latency_table lacks 'first' at W8A8"):
        latencies({}, network, options)
    with pytest.raises(ValueError, match=r"latency_table\['first'\] must be an integer from 2 to 16, got 1"):
        latencies({"first": {1: 1.0}}, network, options)
    path = tmp_path / "latency.csv"
    path.write_text("layer,weight_bits,activation_bits,latency\nfirst,8,8,1\nfirst,8,8,fast\n")
    with pytest.raises(ValueError, match="line 3: expected layer"):
        read_latencies(path)
