import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_calibtip.allocation.integer_program import InfeasibleBudgetError, choose_candidates

values = st.floats(-1, 10, allow_nan=False)
sizes = st.integers(1, 1000)


@st.composite
def instances(draw):
    candidates = draw(st.lists(st.integers(2, 8), min_size=1, max_size=4, unique=True))
    layers = [f"layer{i}" for i in range(draw(st.integers(1, 6)))]
    losses = {layer: {c: draw(values) for c in candidates} for layer in layers}
    costs = {layer: {c: float(draw(sizes) * c) for c in candidates} for layer in layers}
    return losses, costs, draw(st.floats(0, 1))


@given(instances())
@settings(max_examples=25, deadline=None)
def test_objective_equals_that_of_exhaustive_search(instance):
    losses, costs, position = instance
    least = sum(min(c.values()) for c in costs.values())
    greatest = sum(max(c.values()) for c in costs.values())
    budget = least + position * (greatest - least)
    best = math.inf
    for choice in itertools.product(*(of_layer for of_layer in losses.values())):
        picked = dict(zip(losses, choice, strict=True))
        if sum(costs[layer][c] for layer, c in picked.items()) <= budget:
            best = min(best, sum(losses[layer][c] for layer, c in picked.items()))
    found = choose_candidates(losses, costs, budget)
    assert found.predicted_loss == pytest.approx(best, abs=1e-5)
    assert found.cost <= budget * (1 + 1e-6)
    assert found.predicted_loss == pytest.approx(sum(losses[layer][c] for layer, c in found.candidates.items()))


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_tiny_and_huge_values_are_solved_as_well(unit):
    losses = {"a": {4: 3 * unit, 8: 0.0}, "b": {4: 2 * unit, 8: 0.0}}
    costs = {"a": {4: 4 * unit, 8: 8 * unit}, "b": {4: 4 * unit, 8: 8 * unit}}
    assert choose_candidates(losses, costs, 12 * unit).candidates == {"a": 8, "b": 4}


def test_infeasible_budget_states_the_reachable_range():
    table = {"a": {4: 40.0, 8: 80.0}}
    with pytest.raises(InfeasibleBudgetError, match="at most 39: the reachable range is 40 to 80"):
        choose_candidates(table, table, 39)


def test_non_finite_loss_names_layer_and_candidate():
    good = {"a": {4: 1.0}, "b": {4: 1.0}}
    with pytest.raises(ValueError, match="b at 4: the loss is nan"):
        choose_candidates({**good, "b": {4: math.nan}}, good, 2)


def test_empty_and_mismatched_tables_are_refused():
    with pytest.raises(ValueError, match="no layer"):
        choose_candidates({}, {}, 1)
    with pytest.raises(ValueError, match="a: there is no candidate"):
        choose_candidates({"a": {}}, {"a": {}}, 1)
    with pytest.raises(ValueError, match=r"different layers: .*'b'"):
        choose_candidates({"a": {4: 1.0}}, {"b": {4: 1.0}}, 1)
    with pytest.raises(ValueError, match="a: losses and costs have different candidates"):
        choose_candidates({"a": {4: 1.0}}, {"a": {8: 1.0}}, 1)
