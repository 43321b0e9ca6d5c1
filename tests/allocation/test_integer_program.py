import itertools
import math
import random
import re

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_calibtip.allocation.integer_program import (
    Budget,
    InfeasibleBudgetError,
    Solver,
    choose_candidates,
)

values = st.floats(-1, 10, allow_nan=False)
needs_highs = pytest.mark.skipif(not pulp.HiGHS().available(), reason="highspy is not installed")


def reachable_range(table):
    """Least and greatest sum of a table over one candidate a layer."""
    return [sum(pick(of_layer.values()) for of_layer in table.values()) for pick in (min, max)]


@st.composite
def instances(draw):
    candidates = draw(st.lists(st.integers(2, 8), min_size=1, max_size=4, unique=True))
    layers = [f"layer{i}" for i in range(draw(st.integers(1, 8)))]
    losses = {layer: {c: draw(values) for c in candidates} for layer in layers}
    budgets = []
    for number in range(draw(st.integers(1, 2))):
        costs = {layer: {c: float(draw(st.integers(1, 1000)) * c) for c in candidates} for layer in layers}
        least, greatest = reachable_range(costs)
        budgets.append(Budget(f"cost{number}", costs, least + draw(st.floats(0, 1)) * (greatest - least)))
    return losses, budgets


def exhaustive(losses, budgets):
    """Least loss of all choices that keep the budgets (but for rounding); infinite if there is none."""
    best = math.inf
    for choice in itertools.product(*(of_layer for of_layer in losses.values())):
        picked = dict(zip(losses, choice, strict=True))
        if all(sum(b.costs[layer][c] for layer, c in picked.items()) <= b.limit * (1 + 1e-9) for b in budgets):
            best = min(best, sum(losses[layer][c] for layer, c in picked.items()))
    return best


def check_against_exhaustive(losses, budgets, solver):
    best = exhaustive(losses, budgets)
    if best == math.inf:
        with pytest.raises(InfeasibleBudgetError):
            choose_candidates(losses, budgets, solver=solver)
        return
    found = choose_candidates(losses, budgets, solver=solver)
    assert found.objective == pytest.approx(best, abs=1e-7)
    assert found.objective == pytest.approx(sum(losses[layer][c] for layer, c in found.candidates.items()))
    assert found.proved
    for budget in budgets:
        assert found.costs[budget.name] <= budget.limit * (1 + 1e-9)


@given(instances())
@settings(max_examples=200, deadline=None)
def test_objective_equals_that_of_exhaustive_search(instance):
    check_against_exhaustive(*instance, Solver())


@needs_highs
@given(instances())
@settings(max_examples=25, deadline=None)
def test_highs_finds_the_same(instance):
    check_against_exhaustive(*instance, Solver("highs"))


def test_losses_of_any_unit_are_solved_exactly():
    generator = random.Random(3)
    for unit in (1e-12, 1e9):
        losses = {f"l{i}": {c: generator.random() * unit for c in (2, 4, 8)} for i in range(6)}
        costs = {f"l{i}": {c: generator.randint(1, 50) * c for c in (2, 4, 8)} for i in range(6)}
        budgets = [Budget("size", costs, sum(reachable_range(costs)) / 2)]
        assert choose_candidates(losses, budgets).objective == pytest.approx(exhaustive(losses, budgets), rel=1e-9)


LOSSES = {"a": {4: 0.5, 8: 0.0}, "b": {4: 0.1, 8: 0.0}}
SIZES = {"a": {4: 40, 8: 80}, "b": {4: 40, 8: 80}}


def test_one_layer_that_collapses_does_not_hide_the_differences_of_the_others():
    generator = random.Random(5)
    for _ in range(20):
        losses = {
            f"l{i}": {c: generator.random() * 10 ** generator.uniform(-8, -4) for c in (3, 4, 8)} for i in range(5)
        }
        losses["l0"][2] = 1e4
        costs = {name: {c: generator.randint(1, 50) * c for c in of_layer} for name, of_layer in losses.items()}
        budgets = [Budget("size", costs, sum(reachable_range(costs)) / 2)]
        assert choose_candidates(losses, budgets).objective == pytest.approx(exhaustive(losses, budgets), rel=1e-6)


def test_least_cost_under_a_loss_budget():
    assert choose_candidates(SIZES, [Budget("loss", LOSSES, 0.1)]).candidates == {"a": 8, "b": 4}
    assert choose_candidates(SIZES, [Budget("loss", LOSSES, 0.05)]).candidates == {"a": 8, "b": 8}


def test_budget_exactly_at_a_choice_is_met():
    sizes = {name: {bits: 0.1 * bits for bits in (2, 3, 4)} for name in "abcdefgh"}
    losses = {name: {bits: 1 / bits for bits in (2, 3, 4)} for name in sizes}
    for bits in (2, 3, 4):
        limit = sum(sizes[name][bits] for name in reversed(sizes))
        assert choose_candidates(losses, [Budget("size", sizes, limit)]).costs["size"] == pytest.approx(limit)


def test_groups_agree_and_chain():
    losses = {"a": {4: 0.0, 8: 1.0}, "b": {4: 5.0, 8: 0.0}, "c": {4: 0.0, 8: 0.5}, "d": {4: 0.0, 8: 0.1}}
    found = choose_candidates(losses, groups=[["a", "b"], ["b", "c"]])
    assert found.candidates == {"a": 8, "b": 8, "c": 8, "d": 4}
    assert found.objective == 1.5


def test_a_fixed_layer_decides_for_its_group():
    losses = {"a": {4: 0.0, 8: 1.0}, "fixed": {8: 0.0}}
    assert choose_candidates(losses, groups=[["a", "fixed"]]).candidates == {"a": 8, "fixed": 8}
    with pytest.raises(ValueError, match="a, fixed must agree, but have no candidate in common"):
        choose_candidates({"a": {4: 0.0}, "fixed": {8: 0.0}}, groups=[["a", "fixed"]])


def test_equal_losses_take_the_cheaper_candidate_whatever_the_order():
    candidates = [(8, 8), (4, 8), (4, 4), (2, 8)]
    for order in itertools.permutations(candidates):
        losses = {name: {c: float(c == (2, 8)) for c in order} for name in ("y", "x")}
        sizes = {name: {c: float(c[0]) for c in order} for name in ("x", "y")}
        found = choose_candidates(losses, [Budget("size", sizes, 100.0)])
        assert found.candidates == {"x": (4, 4), "y": (4, 4)}


def test_tied_layers_are_chosen_the_same_whatever_the_order():
    names = [f"l{i}" for i in range(6)]
    sizes = {name: {4: 4, 8: 8} for name in names}
    answers = set()
    for seed in range(5):
        order = random.Random(seed).sample(names, len(names))
        losses = {name: {4: 1.0, 8: 0.0} for name in order}
        found = choose_candidates(losses, [Budget("size", sizes, 36)]).candidates
        assert sorted(found.values()) == [4, 4, 4, 8, 8, 8]
        answers.add(tuple(found[name] for name in names))
    assert len(answers) == 1


def test_infeasible_budget_states_the_reachable_range():
    with pytest.raises(InfeasibleBudgetError, match=r"size=70 is out of reach: .* it can be 80 to 160"):
        choose_candidates(LOSSES, [Budget("size", SIZES, 70)])


def test_budgets_that_cannot_be_kept_together_state_what_can():
    losses = {"a": {1: 0.0, 2: 0.0}}
    first, second = {"a": {1: 1.0, 2: 10.0}}, {"a": {1: 10.0, 2: 1.0}}
    with pytest.raises(InfeasibleBudgetError, match=r"first=5, second=5\).*first from 10, if .* to 10; second from 10"):
        choose_candidates(losses, [Budget("first", first, 5), Budget("second", second, 5)])


@pytest.mark.parametrize(
    ("losses", "sizes", "message"),
    [
        ({}, {}, "no layer"),
        ({"a": {}}, {"a": {}}, "a: there is no candidate"),
        ({"a": {4: 1.0}}, {"b": {4: 1.0}}, "objective and size name different layers: a, b"),
        ({"a": {4: 1.0}}, {"a": {8: 1.0}}, "a: objective and size have different candidates"),
        ({"a": {4: math.nan}}, {"a": {4: 1.0}}, "a at 4: the objective is nan"),
        ({"a": {4: 1.0}}, {"a": {4: math.inf}}, "a at 4: the size is inf"),
    ],
)
def test_bad_tables_are_named(losses, sizes, message):
    with pytest.raises(ValueError, match=message):
        choose_candidates(losses, [Budget("size", sizes, 1.0)])


def test_unknown_layer_in_a_group_is_named():
    with pytest.raises(ValueError, match="'z' is no layer of the table; these are: a, b"):
        choose_candidates(LOSSES, groups=[["a", "z"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gurobi"}, "solver must be one of cbc, highs, got 'gurobi'"),
        ({"time_limit": 0}, "time_limit must be a finite number of seconds above 0, got 0"),
        ({"gap": 1}, "gap must be from 0 to below 1, got 1"),
    ],
)
def test_bad_solver_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Solver(**options)


def test_a_missing_solver_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    with pytest.raises(ValueError, match=r"needs highspy: pip install .*\[highs\]"):
        Solver("highs")


def test_time_limit_gives_the_best_so_far_or_says_that_there_is_none(monkeypatch):
    def stopped(status, solution):
        def solve(program, solver):
            for variable in program.variables():
                variable.varValue = float(variable.name.endswith("_0"))
            program.assignStatus(status, solution)
            return program.status

        return solve

    budget = Budget("size", SIZES, 120)
    monkeypatch.setattr(pulp.LpProblem, "solve", stopped(pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible))
    assert not choose_candidates(LOSSES, [budget]).proved
    monkeypatch.setattr(pulp.LpProblem, "solve", stopped(pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound))
    with pytest.raises(RuntimeError, match=r"found no choice .* within time_limit=5"):
        choose_candidates(LOSSES, [budget], solver=Solver(time_limit=5))


def test_the_limit_that_a_message_names_can_be_kept():
    sizes = {"a": {4: 0.1221590000001, 8: 1.0}}
    with pytest.raises(InfeasibleBudgetError, match=r"it can be 0\.12216 to 1\. Raise it") as caught:
        choose_candidates(sizes, [Budget("compression", sizes, 0.1)])
    named = float(re.search(r"can be (\S+) to", str(caught.value))[1])
    assert choose_candidates(sizes, [Budget("compression", sizes, named)]).candidates == {"a": 4}
