"""Candidates that leave something in float, or that make no difference to a layer; costs of the user's own."""

import pytest
import torch
from torch import nn

from lightning_calibtip.allocation.allocate import Model, allocate
from lightning_calibtip.allocation.constraints import Constraints
from lightning_calibtip.allocation.costs import _COSTS, register_cost
from lightning_calibtip.allocation.integer_program import InfeasibleBudgetError
from lightning_calibtip.allocation.options import AllocationOptions
from lightning_calibtip.allocation.problem import Problem
from lightning_calibtip.allocation.work import measure_work
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.quantization.spec import BitWidths as B
from tests.allocation.allocating import CANDIDATES, allocated, start_again
from tests.networks import calibrated_network, calibration_set


def test_weight_only_candidates_go_through_measuring_checking_a_sweep_and_the_table(calibrated, tmp_path):
    network, calibration = calibrated
    path, sizes = tmp_path / "table.csv", [0.12, 0.2]
    initial = {name: layer.save() for name, layer in network.layers.items()}
    wanted = {"candidates": [(2, None), (4, 8), (8, None)], "compression": sizes, "bit_operations": 1e12}
    outcome = allocate(network, calibration, AllocationOptions(**wanted, table=path), evaluate=lambda: {"top1": 0.5})
    assert outcome.sensitivity.conditions.base == B(8, None)
    assert [point.label for point in outcome.uniform] == ["W2", "W4A8", "W8"]
    layers = {name: network.layers[name] for name in network.searchable_layers}
    for name, bits in outcome.chosen.bits.items():
        assert layers[name].config.bit_widths == bits
        assert (layers[name].input_quantizers == (None,)) == (bits.activation is None)
    # All pinned layers have 8 bits.
    bits = {name: outcome.chosen.bits.get(name, B(8, 8)) for name in network.layers}
    sizes = {name: layer.weight.numel() for name, layer in network.layers.items()}
    reached = sum(sizes[name] * bits[name].weight for name in sizes) / (32 * sum(sizes.values()))
    assert outcome.chosen.compression == pytest.approx(reached)
    work = measure_work(network, calibration)
    operations = sum(work[n].multiply_accumulates * b.weight * (b.activation or 32) for n, b in bits.items())
    assert outcome.chosen.costs["bit_operations"] == pytest.approx(operations)
    start_again(network, initial)
    again = allocate(network, calibration, AllocationOptions(**wanted, sensitivity=path))
    assert again.sensitivity == outcome.sensitivity and again.chosen.compression <= 0.2 * (1 + 1e-9)


def test_activation_only_candidates_keep_float_weights(calibrated):
    network, calibration = calibrated
    wanted = {"compression": 1.0, "activation_bytes": 1300.0, "checks": 0}
    chosen = allocated(network, calibration, [(None, 4), (None, 8)], **wanted).chosen
    assert set(chosen.bits.values()) == {B(None, 4), B(None, 8)}
    assert all(network.layers[name].weight_quantizer is None for name in network.searchable_layers)


def test_one_number_stands_for_what_the_scheme_quantizes(tiny_resnet, images):
    calibration = calibration_set(tiny_resnet, images)
    network = calibrated_network(tiny_resnet, calibration, weight_bits=8, activation_bits=None)
    chosen = allocated(network, calibration, [2, 8], compression=0.2).chosen
    assert set(chosen.bits.values()) == {B(2, None), B(8, None)}
    with pytest.raises(ValueError, match=r"at least two different bit-widths, got \[4, \(4, None\)\] \(W4 "):
        allocated(network, calibration, [4, (4, None)], compression=0.2)


@pytest.fixture
def narrow_layers():
    """A cost registered by a user: the number of layers below 8 bits, pinned and float ones included."""

    @register_cost("narrow_layers")
    def count(inputs):
        return inputs.tabulate(lambda name, config: float((config.bit_widths.weight or 32) < 8))

    yield count
    del _COSTS["narrow_layers"]


@pytest.mark.usefixtures("narrow_layers")
def test_a_cost_of_the_users_own_is_a_budget_and_is_minimised(calibrated):
    network, calibration = calibrated
    wanted = {"compression": 0.2, "budgets": {"narrow_layers": "3"}, "checks": 3}
    chosen = allocated(network, calibration, CANDIDATES, **wanted).chosen
    assert sum(bits.weight < 8 for bits in chosen.bits.values()) == chosen.costs["narrow_layers"] <= 3
    fewest = allocated(network, calibration, CANDIDATES, max_loss=1e9, minimise="narrow_layers").chosen
    assert fewest.costs["narrow_layers"] == 0 and set(fewest.bits.values()) == {B(8, 8)}
    with pytest.raises(
        InfeasibleBudgetError, match=r"narrow_layers=0.5, compression=0.1|compression=0.1, narrow_layers"
    ):
        allocated(network, calibration, CANDIDATES, compression=0.1, budgets={"narrow_layers": 0.5})


def test_two_layers_of_one_effective_format_are_measured_as_one_model(images, monkeypatch):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    calibration = calibration_set(model, torch.randint(0, 9, (8, 3)))
    network = calibrated_network(model, calibration, weight_bits=8, activation_bits=8, edge_bits=None)
    counted, measured = [], Loss.__call__
    monkeypatch.setattr(Loss, "__call__", lambda self, run=None: counted.append(run) or measured(self, run))
    problem = Problem(network, calibration, [B(8, 4), B(8, 8)], Constraints({"compression": 0.5}))
    model = Model(network, Loss(network, calibration), 0.0)
    narrow = {**problem.uniform(B(8, 8)), "0": B(8, 4)}
    assert model.measure(problem.uniform(B(8, 8))) == model.measure(narrow) and len(counted) == 1


def test_candidates_that_make_no_difference_to_a_layer_are_ordered_all_the_same(images):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    calibration = calibration_set(model, torch.randint(0, 9, (8, 3)))
    network = calibrated_network(model, calibration, weight_bits=8, activation_bits=8, edge_bits=None)
    candidates = [B(4, 4), B(4, 6), B(4, None), B(8, 8)]
    chosen = allocated(network, calibration, candidates, compression=0.5).chosen
    assert abs(chosen.measured_loss) < 1e-3 and chosen.bits.keys() == {"0", "2"}
