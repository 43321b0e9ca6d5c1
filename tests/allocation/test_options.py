"""What bit allocation accepts: as Python values, as text, from YAML; and what it refuses at construction."""

import math

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_calibtip.allocation.costs import cost_names, register_cost
from lightning_calibtip.allocation.options import AllocationOptions
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.quantization.spec import BitWidths as B


def test_the_papers_smallest_model_is_the_default_budget():
    assert AllocationOptions().constraints.limits == {"compression": 0.13}
    assert AllocationOptions(bit_operations=1e9).constraints.limits == {"bit_operations": 1e9}
    assert AllocationOptions().sweep.compression == []


def test_a_list_of_budgets_is_a_sweep_below_the_greatest():
    options = AllocationOptions(compression=[0.1, "0.2"], pick_under="0.15", weight_bytes="2MB")
    assert options.sweep.compression == [0.1, 0.2] and options.sweep.under == 0.15
    assert options.constraints.limits == {"compression": 0.2, "weight_bytes": 2e6}


def test_numbers_may_be_text_and_bytes_have_units():
    given = {"compression": "0.2", "bit_operations": "2e9", "activation_bytes": "1.5 KiB", "weight_bytes": 10}
    limits = AllocationOptions(**given, gap="0.01", time_limit="5").constraints.limits
    assert limits == {"compression": 0.2, "bit_operations": 2e9, "activation_bytes": 1536.0, "weight_bytes": 10.0}
    solver = AllocationOptions(gap="0.01", time_limit="5").constraints.solver
    assert (solver.gap, solver.time_limit) == (0.01, 5.0)


def test_registered_costs_have_their_budgets_in_a_mapping():
    limits = AllocationOptions(budgets={"weight_bytes": "2MB", "compression": "0.2"}).constraints.limits
    assert limits == {"weight_bytes": 2e6, "compression": 0.2}
    assert cost_names()[:5] == ["compression", "weight_bytes", "bit_operations", "activation_bytes", "latency"]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [({}, [B(4, 4), B(4, None), B(None, 6)]), ({"weight_bits": None}, [B(None, 4), B(4, None), B(None, 6)])],
)
def test_a_number_among_candidates_is_resolved_by_the_scheme(scheme, expected):
    options = AllocationOptions(candidates=[4, (4, None), [None, 6], 4])
    assert options.bit_widths(QuantizationScheme(**scheme)) == expected


def test_a_table_of_the_caller_replaces_that_of_the_options(tmp_path):
    options = AllocationOptions(table=str(tmp_path / "own.csv"), sensitivity="old.csv")
    assert options.sensitivity_options().path == tmp_path / "own.csv"
    assert options.sensitivity_options(tmp_path / "state.csv").path == tmp_path / "state.csv"
    assert options.sensitivity_options().reuse.name == "old.csv"


def test_a_latency_table_is_read_from_its_file_at_construction(tmp_path):
    with pytest.raises(FileNotFoundError):
        AllocationOptions(latency=1.0, latency_table=tmp_path / "latency.csv")
    path = tmp_path / "latency.csv"
    path.write_text("layer,weight_bits,activation_bits,latency\nfirst,4,,1\n")
    constraints = AllocationOptions(latency=1.0, latency_table=str(path)).constraints
    assert constraints.latency_table == {"first": {B(4, None): 1.0}} and constraints.limits == {"latency": 1.0}


def test_a_parser_reads_all_kinds_of_values(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--allocation", type=AllocationOptions)
    path = tmp_path / "options.yaml"
    path.write_text(
        "allocation:\n  compression: [0.1, 2e-1]\n  candidates: [4, [2, 8], [4, null]]\n  weight_bytes: 2MB\n"
        "  bit_operations: 2e9\n  budgets: {activation_bytes: 1e6}\n  groups: [[a, b.*]]\n  metric: mse\n"
        "  latency_table: {conv1: {4: 1.5}}\n  reset_to_float: true\n"
    )
    parser.add_argument("--config", action="config")
    given = parser.parse_args([f"--config={path}"])
    options = getattr(parser, "instantiate", parser.instantiate_classes)(given).allocation
    assert options.sweep.compression == [0.1, 0.2] and options.metric == "mse" and options.reset_to_float
    assert options.bit_widths(QuantizationScheme()) == [B(4, 4), B(2, 8), B(4, None)]
    limits = {"weight_bytes": 2e6, "bit_operations": 2e9, "activation_bytes": 1e6, "compression": 0.2}
    assert options.constraints.limits == limits and options.constraints.groups == [["a", "b.*"]]
    assert parser.parse_args(["--allocation.weight_bytes=3"]).allocation.weight_bytes == 3
    given = parser.parse_args(["--allocation.metric=torch.nn.functional.mse_loss"])
    made = getattr(parser, "instantiate", parser.instantiate_classes)(given).allocation
    assert made.sensitivity_options().metric is torch.nn.functional.mse_loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": {"size": 1.0}}, "A budget must be one of compression, .*, got 'size'"),
        ({"budgets": {"loss": 1.0}}, "budgets are costs, got 'loss': give the budget of the loss as max_loss"),
        ({"budgets": {"latency": "fast"}}, "latency must be a number, got 'fast'"),
        ({"weight_bytes": 5, "budgets": {"weight_bytes": 5}}, "weight_bytes is given twice"),
        ({"weight_bytes": 0}, "weight_bytes must be a positive number of bytes"),
        ({"compression": math.nan}, "compression must be above 0, got nan"),
        ({"compression": None, "max_loss": 0.1, "minimise": "size"}, "minimise must be one of loss, compression"),
        ({"candidates": [4, [4, 4]]}, r"at least two different bit-widths, got \[4, \[4, 4\]\]"),
        ({"candidates": [4, [None, None]]}, r"candidates\[1\] must quantize the weight or the activation"),
        (
            {"candidates": [4, "8"]},
            r"candidates\[1\] must be a bit-width or a pair \(weight_bits, activation_bits\), got '8'",
        ),
        ({"checks": -1}, "checks must be an integer of at least 0, got -1"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"gap": 1.0}, "gap must be from 0 to below 1"),
        ({"time_limit": 0}, "time_limit must be a finite number of seconds above 0"),
        ({"pick_under": 0.2}, "pick a point of a sweep"),
    ],
)
def test_bad_values_raise_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        AllocationOptions(**options)


def test_the_loss_is_no_name_for_a_cost():
    with pytest.raises(ValueError, match='A cost cannot be named "loss"'):
        register_cost("loss")
