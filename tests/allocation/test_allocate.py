import logging
import math

import pytest
import torch
from torch import nn

from lightning_calibtip.allocation.constraints import Constraints
from lightning_calibtip.allocation.integer_program import InfeasibleBudgetError
from lightning_calibtip.allocation.outcome import Point, Sweep
from lightning_calibtip.allocation.problem import Problem
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.quantization.spec import BitWidths as B
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.candidates import adaquant_candidates
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.allocation.allocating import CANDIDATES, SMALL, allocated, bit_widths, start_again
from tests.conftest import TinyResNet
from tests.networks import calibrated_network, calibration_set


def test_allocation_stays_within_the_budget_and_spends_bits_where_it_hurts_most(calibrated):
    network, calibration = calibrated
    sizes = {name: layer.weight.numel() for name, layer in network.layers.items()}
    outcome = allocated(network, calibration, CANDIDATES, **SMALL, checks=0)
    chosen, bits = outcome.chosen, bit_widths(network)
    assert {name: bits[name] for name in network.searchable_layers} == chosen.bits
    assert bits["stem"] == bits["head"] == B(8, 8)
    reached = sum(sizes[name] * bits[name].weight for name in sizes) / (32 * sum(sizes.values()))
    assert chosen.compression == chosen.costs["compression"] == pytest.approx(reached) and reached <= 0.16
    assert set(chosen.bits.values()) == {B(2, 8), B(8, 8)}
    # All searchable layers have the same size here, so those at 8 bits must be the most sensitive ones.
    worth = {name: outcome.sensitivity.rise(name, B(2, 8)) for name in network.searchable_layers}
    wide = [worth[name] for name, bits in chosen.bits.items() if bits == B(8, 8)]
    narrow = [worth[name] for name, bits in chosen.bits.items() if bits == B(2, 8)]
    assert min(wide) >= max(narrow)
    assert chosen.predicted_loss == pytest.approx(sum(narrow))
    measured = Loss(network, calibration)() - outcome.sensitivity.base_loss
    assert chosen.measured_loss == pytest.approx(measured, rel=1e-2, abs=1e-6)
    assert outcome.curve == [chosen] and outcome.uniform == []


def test_every_budget_holds_at_once(calibrated):
    network, calibration = calibrated
    candidates = [B(2, 4), B(2, 8), B(4, 4), B(4, 8), B(8, 8)]
    latency = {
        name: {bits: bits.weight * bits.activation / 64 for bits in [*candidates, B(8, 8)]} for name in network.layers
    }
    everything = ("compression", "weight_bytes", "bit_operations", "activation_bytes", "latency")
    wide = allocated(network, calibration, candidates, compression=1.0, latency_table=latency).chosen
    assert set(wide.costs) == {"compression", "latency"} and wide.predicted_loss <= 0
    least = {
        name: allocated(
            network, calibration, candidates, max_loss=1e9, minimise=name, latency_table=latency, checks=0
        ).chosen.costs[name]
        for name in everything
    }
    limits = {name: value * 1.5 for name, value in least.items()}
    chosen = allocated(network, calibration, candidates, latency_table=latency, **limits).chosen
    assert chosen.costs.keys() == limits.keys()
    assert all(chosen.costs[name] <= limits[name] * (1 + 1e-9) for name in limits)
    assert any(bits not in (B(2, 4), B(8, 8)) for bits in chosen.bits.values())


def test_least_size_under_a_loss_budget_is_checked_by_the_true_loss(calibrated):
    network, calibration = calibrated
    outcome = allocated(
        network, calibration, [B(2, 8), B(3, 8), B(4, 8), B(8, 8)], max_loss=0.02, minimise="compression"
    )
    chosen = outcome.chosen
    assert chosen.measured_loss <= 0.02
    measured = Loss(network, calibration)() - outcome.sensitivity.base_loss
    assert measured == pytest.approx(chosen.measured_loss, rel=1e-2, abs=1e-6)
    assert chosen.compression < 0.25


def test_a_loss_budget_that_cannot_be_kept_is_an_error(calibrated, monkeypatch):
    network, calibration = calibrated
    measured = Loss.__call__
    calls = iter(range(1000))
    # The single-layer losses are measured truly, the models that are chosen all seem bad.
    monkeypatch.setattr(
        Loss, "__call__", lambda self, run=None: measured(self, run) + (next(calls) > 4 and run is None)
    )
    with pytest.raises(InfeasibleBudgetError, match=r"max_loss=0.02 is out of reach: .* measures 1\S* above the base"):
        allocated(network, calibration, CANDIDATES, max_loss=0.02, minimise="compression")
    assert set(bit_widths(network).values()) == {B(8, 8)}


@pytest.mark.parametrize("checks", [1, 2, 16])
def test_a_loss_budget_that_can_be_kept_is_kept_however_few_the_checks(calibrated, monkeypatch, checks):
    network, calibration = calibrated
    measured = Loss.__call__

    def worse_when_mixed(self, run=None):
        """Models with more than one narrow layer lose far more than predicted."""
        narrow = sum(layer.config.weight.bits < 8 for layer in network.layers.values())
        return measured(self, run) + (1.0 if narrow > 1 else 0.0)

    monkeypatch.setattr(Loss, "__call__", worse_when_mixed)
    chosen = allocated(
        network, calibration, [B(2, 8), B(4, 8), B(8, 8)], max_loss=0.5, minimise="compression", checks=checks
    ).chosen
    assert chosen.measured_loss <= 0.5


def test_groups_agree(calibrated):
    network, calibration = calibrated
    groups = [["blocks.0.conv1", "blocks.1.*"]]
    bits = allocated(network, calibration, CANDIDATES, compression=0.2, groups=groups).chosen.bits
    assert bits["blocks.0.conv1"] == bits["blocks.1.conv1"] == bits["blocks.1.conv2"]
    with pytest.raises(ValueError, match="groups: 'conv9' matches no quantized layer"):
        allocated(network, calibration, CANDIDATES, compression=0.2, groups=[["conv9"]])


def test_layers_that_meet_in_a_sum_or_read_one_tensor_agree_when_asked(images):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.head((self.left(x).relu() + 1e-3 * self.right(x)).mean((2, 3)))

    torch.manual_seed(0)
    model = Joined().eval()
    calibration = calibration_set(model, images)
    network = calibrated_network(model, calibration, weight_bits=8, activation_bits=8)
    alone = allocated(network, calibration, CANDIDATES, compression=0.18, checks=0).chosen.bits
    assert alone == {"left": B(8, 8), "right": B(2, 8)}
    for agree in ("agree_on_add", "agree_on_input"):
        chosen = allocated(network, calibration, CANDIDATES, compression=0.18, **{agree: True}).chosen
        assert set(chosen.bits.values()) == {B(2, 8)}


def test_a_pinned_layer_does_not_bind_those_that_it_meets(calibrated):
    network, calibration = calibrated
    # The stem, whose bit-widths are pinned, feeds the same sum as the first block's second layer.
    bits = allocated(network, calibration, [B(2, 8), B(4, 8)], compression=0.1, agree_on_add=True).chosen.bits
    assert bits["blocks.0.conv2"] in [B(2, 8), B(4, 8)]


def test_overlapping_groups_are_checked_as_one(calibrated):
    network, calibration = calibrated
    overlapping = [["blocks.0.conv1", "blocks.0.conv2"], ["blocks.0.conv2", "blocks.1.conv1"]]
    problem = Problem(network, calibration, CANDIDATES, Constraints({"compression": 0.2}, groups=overlapping))
    merged = [group for group in problem.groups if len(group) > 1]
    assert merged == [("blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1")]
    with pytest.raises(ValueError, match="a group is empty"):
        Problem(network, calibration, CANDIDATES, Constraints({"compression": 0.2}, groups=[[]]))


def test_a_true_loss_that_is_not_finite_is_never_chosen(calibrated, monkeypatch):
    network, calibration = calibrated
    measured = Loss.__call__
    seen = []

    def failing(self, run=None):
        seen.append(run)
        # The program's choice is the second to be measured by a whole pass, after the base.
        return math.nan if sum(r is None for r in seen) == 2 and run is None else measured(self, run)

    monkeypatch.setattr(Loss, "__call__", failing)
    outcome = allocated(network, calibration, CANDIDATES, **SMALL)
    assert math.isfinite(outcome.chosen.measured_loss)
    seen.clear()
    with pytest.raises(ValueError, match="The loss of the chosen model, and of 0 alternatives, is not finite"):
        allocated(network, calibration, CANDIDATES, **SMALL, checks=0)
    assert {name: bit_widths(network)[name] for name in network.searchable_layers} == outcome.chosen.bits


def test_an_error_leaves_the_layers_as_they_were(calibrated):
    network, calibration = calibrated
    before = {name: layer.save() for name, layer in network.layers.items()}
    with pytest.raises(ValueError, match="No point of the sweep"):
        allocated(network, calibration, CANDIDATES, compression=[0.1, 0.2], max_degradation=-100.0)
    for name, layer in network.layers.items():
        assert layer.config == before[name].config and torch.equal(layer.weight, before[name].weight)
        assert torch.equal(layer.weight_quantizer.scale, before[name].qparams[0])


def test_reconstructed_states_are_used_where_there_are_some(calibrated):
    network, calibration = calibrated
    options = AdaQuantOptions(iterations=20, batch_size=16, mode="parallel", granularity="layer")
    adaquant_candidates(network, calibration, options, CANDIDATES)
    outcome = allocated(network, calibration, CANDIDATES, **SMALL)
    for name, bits in outcome.chosen.bits.items():
        layer = network.layers[name]
        assert torch.equal(layer.weight, layer.variants[network.config_for(name, bits)].weight)
        assert layer.errors == layer.variants[network.config_for(name, bits)].errors


def test_work_done_before_allocation_is_kept(calibrated):
    network, calibration = calibrated
    options = {"iterations": 30, "batch_size": 16, "weight_rate": 0.1}
    adaquant(network, calibration, AdaQuantOptions(mode="parallel", granularity="layer", **options))
    before = {name: network.layers[name].save() for name in network.searchable_layers}
    outcome = allocated(network, calibration, CANDIDATES, **SMALL)
    wide = [name for name, bits in outcome.chosen.bits.items() if bits == B(8, 8)]
    assert wide and all(torch.equal(network.layers[name].weight, before[name].weight) for name in wide)


def test_a_misleading_table_is_found_out(calibrated, tmp_path):
    network, calibration = calibrated
    candidates, budget = [B(2, 8), B(3, 8), B(8, 8)], {"compression": 0.11}
    initial = {name: layer.save() for name, layer in network.layers.items()}
    table = allocated(network, calibration, candidates, **budget).sensitivity
    for of_layer in table.losses.values():
        of_layer[B(2, 8)], of_layer[B(3, 8)] = table.base_loss - 1, table.base_loss
    table.write(tmp_path / "table.csv")
    reuse = tmp_path / "table.csv"
    start_again(network, initial)
    misled = allocated(network, calibration, candidates, **budget, sensitivity=reuse, checks=0).chosen
    assert set(misled.bits.values()) == {B(2, 8)}
    start_again(network, initial)
    checked = allocated(network, calibration, candidates, **budget, sensitivity=reuse).chosen
    assert checked.measured_loss < misled.measured_loss
    network_loss = Loss(network, calibration)() - table.base_loss
    assert network_loss == pytest.approx(checked.measured_loss, rel=1e-2, abs=1e-6) and checked.compression <= 0.11


def test_checks_are_as_many_as_asked(calibrated, monkeypatch):
    network, calibration = calibrated
    counted = []
    measured = Loss.__call__
    monkeypatch.setattr(Loss, "__call__", lambda self, run=None: counted.append(run) or measured(self, run))
    for checks in (0, 1, 5):
        counted.clear()
        allocated(network, calibration, [B(2, 8), B(3, 8), B(4, 8), B(8, 8)], compression=0.2, checks=checks)
        assert sum(run is None for run in counted) == 1 + 1 + checks


def test_a_sweep_solves_all_from_one_table_and_picks_by_rule(calibrated):
    network, calibration = calibrated
    candidates, sizes = [B(2, 8), B(3, 8), B(4, 8), B(8, 8)], [0.16, 0.1, 0.2, 0.24]
    seen = []

    def evaluate():
        seen.append(bit_widths(network))
        return {"top1": float(len(seen))}

    outcome = allocated(network, calibration, candidates, evaluate, compression=sizes)
    assert [point.label for point in outcome.curve] == ["0.16", "0.1", "0.2", "0.24"]
    assert all(point.compression <= size * (1 + 1e-9) for point, size in zip(outcome.curve, sizes, strict=True))
    by_size = sorted(outcome.curve, key=lambda point: point.compression)
    predicted = [point.predicted_loss for point in by_size]
    assert predicted == sorted(predicted, reverse=True)
    assert [point.label for point in outcome.uniform] == ["W2A8", "W3A8", "W4A8", "W8A8"]
    assert outcome.uniform[-1].measured_loss == pytest.approx(0, abs=1e-6)
    assert [point.metrics["top1"] for point in [*outcome.curve, *outcome.uniform]] == [float(i) for i in range(1, 9)]
    for point, bits in zip([*outcome.curve, *outcome.uniform], seen, strict=True):
        assert point.bits.items() <= bits.items()
    assert outcome.chosen.measured_loss == min(point.measured_loss for point in outcome.curve)
    assert {name: bit_widths(network)[name] for name in network.searchable_layers} == outcome.chosen.bits


def points(*values):
    return [Point(str(size), {}, size, loss, loss, {}) for size, loss in values]


def test_picking_rules():
    curve = points((0.2, 0.1), (0.1, 1.0), (0.15, 0.5))
    sizes = [0.1, 0.15, 0.2]
    assert Sweep(sizes).pick(curve).compression == 0.2
    assert Sweep(sizes, under=0.16).pick(curve).compression == 0.15
    assert Sweep(sizes, max_degradation=0.6).pick(curve).compression == 0.15
    with pytest.raises(
        ValueError, match=r"degradation of at most 0.05. Measured .*0.1000: 1, 0.1500: 0.5, 0.2000: 0.1"
    ):
        Sweep(sizes, max_degradation=0.05).pick(curve)
    with pytest.raises(ValueError, match="pick a point of a sweep: give compression as a list"):
        Sweep(under=0.1)


def test_a_table_is_reused_without_measuring(calibrated, tmp_path, monkeypatch, caplog):
    network, calibration = calibrated
    path = tmp_path / "table.csv"
    initial = {name: layer.save() for name, layer in network.layers.items()}
    first = allocated(network, calibration, CANDIDATES, **SMALL, table=path)
    runs = []
    measured = Loss.__call__
    monkeypatch.setattr(Loss, "__call__", lambda self, run=None: runs.append(run) or measured(self, run))
    start_again(network, initial)
    again = allocated(network, calibration, CANDIDATES, **SMALL, sensitivity=path, checks=0)
    assert again.sensitivity == first.sensitivity and runs == [None]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    # The true loss of other states says nothing about the table's.
    start_again(network, initial)
    calibration.batches.pop()
    runs.clear()
    allocated(network, calibration, CANDIDATES, **SMALL, sensitivity=path, checks=5)
    assert "was measured with other states of the layers, or on other samples" in caplog.text
    # The base, from which the rise is counted, and the choice.
    assert len(runs) == 2


def test_a_table_that_does_not_fit_is_refused(calibrated, images, tmp_path):
    network, calibration = calibrated
    path = tmp_path / "table.csv"
    allocated(network, calibration, CANDIDATES, **SMALL, table=path)
    with pytest.raises(ValueError, match=r"lacks measurements: .*blocks\.0\.conv1.*W4A8"):
        allocated(network, calibration, [*CANDIDATES, B(4, 8)], **SMALL, sensitivity=path)
    with pytest.raises(ValueError, match="was measured with metric kl, this run has mse"):
        allocated(network, calibration, CANDIDATES, **SMALL, metric="mse", sensitivity=path)
    with pytest.raises(ValueError, match="was measured with base W8A8, this run has W16A8"):
        allocated(network, calibration, [*CANDIDATES, B(16, 8)], **SMALL, sensitivity=path)
    with pytest.raises(FileNotFoundError):
        allocated(network, calibration, CANDIDATES, **SMALL, sensitivity=tmp_path / "other.csv")
    other = TinyResNet(blocks=3).eval()
    calibration = calibration_set(other, images)
    network = calibrated_network(other, calibration)
    with pytest.raises(ValueError, match=r"table\.csv was measured on another model"):
        allocated(network, calibration, CANDIDATES, **SMALL, sensitivity=path)


def test_a_measurement_that_is_not_finite_is_named(calibrated):
    network, calibration = calibrated
    values = iter([0.1, 0.2, math.nan])
    with pytest.raises(
        ValueError, match=r"the loss with blocks\.0\.conv2 at 2 bits of weight and 8 of activation is nan"
    ):
        allocated(network, calibration, CANDIDATES, **SMALL, metric=lambda o, b: next(values), samples=16)


def test_unreachable_compression_states_the_range_before_anything_is_measured(calibrated, monkeypatch):
    network, calibration = calibrated
    monkeypatch.setattr(Loss, "__init__", None)
    with pytest.raises(InfeasibleBudgetError, match=r"compression=0.03 is out of reach: .* 0\.0\d+ to 0\.25"):
        allocated(network, calibration, CANDIDATES, compression=0.03)
    with pytest.raises(InfeasibleBudgetError, match=r"compression=0.03 is out of reach"):
        allocated(network, calibration, CANDIDATES, compression=[0.2, 0.03])
    assert set(bit_widths(network).values()) == {B(8, 8)}


def test_float_layers_count_with_32_bits(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, images)
    network = calibrated_network(tiny_resnet, calibration, overrides={"blocks.0.*": None})
    with pytest.raises(InfeasibleBudgetError):
        allocated(network, calibration, CANDIDATES, compression=0.3)


def test_nothing_to_choose_is_an_error(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, images)
    network = calibrated_network(tiny_resnet, calibration, overrides={"*": 8})
    with pytest.raises(ValueError, match="No layer's bit-widths are free"):
        allocated(network, calibration, CANDIDATES, compression=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {}}, "minimise='loss' needs a budget of compression"),
        ({"limits": {"size": 1.0}}, "A budget must be one of compression, .*, got 'size'"),
        ({"limits": {"bit_operations": -1.0}}, "bit_operations must be above 0, got -1"),
        ({"limits": {"compression": 1.5}}, "compression must be at most 1, got 1.5"),
        ({"limits": {"compression": 0.5}, "minimise": "top1"}, "minimise must be one of loss, compression"),
        ({"limits": {"compression": 0.5}, "minimise": "bit_operations"}, "needs max_loss"),
        ({"limits": {"latency": 0.5}}, "latency needs a latency_table"),
    ],
)
def test_bad_constraints_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Constraints(**options)
