"""The integer program that picks one candidate for each layer (Hubara et al. 2021), on tables alone."""

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any, Generic, TypeVar

import pulp

from ..extras import needs_extra

Candidate = TypeVar("Candidate", bound=Hashable)
Table = Mapping[str, Mapping[Candidate, float]]

SOLVERS = ("cbc", "highs")

# Share by which a sum may exceed its limit: what adding up in another order can make.
_ROUNDING = 1e-9

# CBC's tolerances are absolute, about 1e-6: tables are scaled to sums of this order.
_SCALE = 1e4

# What is left out must make the scale finer by this factor to be worth another solution.
_FINER = 10


@dataclass(frozen=True)
class Budget(Generic[Candidate]):
    """A limit on the sum of a table over the chosen candidates.

    Args:
        name: For messages and for ``Choice.costs``: ``"compression"``, ``"bit operations"``, ...
        costs: Layer -> candidate -> cost, in any unit.
        limit: Greatest allowed sum, in the same unit.

    Example:
        See ``choose_candidates``.
    """

    name: str
    costs: Table[Candidate]
    limit: float


@dataclass(frozen=True)
class Solver:
    """How the program is solved.

    Args:
        name: ``"cbc"``, which comes with PuLP, or ``"highs"``, where ``highspy`` is installed.
        time_limit: Seconds, above 0, after which the best choice so far is taken; None for none.
        gap: Relative distance from the optimum, 0 to 1, at which the search may stop.

    Raises:
        ValueError: If a value is out of its range, or the solver is not installed.

    Example:
        >>> Solver(gap=0.01).name
        'cbc'
    """

    name: str = "cbc"
    time_limit: float | None = None
    gap: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.name!r}.")
        if self.name == "highs" and not pulp.HiGHS().available():
            raise ValueError(needs_extra("solver='highs'", "highspy", "highs") + ", or take 'cbc'.")
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise ValueError(f"time_limit must be a finite number of seconds above 0, got {self.time_limit}.")
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap must be from 0 to below 1, got {self.gap}.")

    def make(self) -> Any:
        """Solver of PuLP with these settings; one thread and a fixed seed, so that it repeats itself."""
        options: dict[str, Any] = {"msg": False, "threads": 1, "timeLimit": self.time_limit, "gapRel": self.gap}
        if self.name == "highs":
            return pulp.HiGHS(**options, random_seed=0)
        return pulp.PULP_CBC_CMD(**options, options=["randomSeed 0", "increment 1e-9"])


@dataclass(frozen=True)
class Choice(Generic[Candidate]):
    """Solution of the program.

    Args:
        candidates: The chosen candidate of each layer.
        objective: Sum of the chosen entries of the minimised table.
        costs: Sum of the chosen costs by the budgets' names, each at most its limit.
        proved: Whether the solver has proved that nothing better (by more than the gap) exists; False if time ran out.

    Example:
        See ``choose_candidates``.
    """

    candidates: dict[str, Candidate]
    objective: float
    costs: dict[str, float]
    proved: bool


class InfeasibleBudgetError(ValueError):
    """No choice of candidates keeps all budgets.

    Example:
        >>> sizes = {"a": {4: 40, 8: 80}}
        >>> choose_candidates(sizes, [Budget("bytes", sizes, 20)])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_calibtip.allocation.integer_program.InfeasibleBudgetError: bytes=20 is out of reach: ...
    """


@dataclass
class _Slot(Generic[Candidate]):
    """Layers that take the same candidate; ``options``: candidate -> its objective and its cost in each budget."""

    layers: tuple[str, ...]
    options: dict[Candidate, tuple[float, ...]]


def choose_candidates(
    objective: Table[Candidate],
    budgets: Sequence[Budget[Candidate]] = (),
    groups: Iterable[Sequence[str]] = (),
    solver: Solver | None = None,
) -> Choice[Candidate]:
    """Least sum of ``objective`` within all budgets, with exactly one candidate a layer.

    With losses as the objective and sizes as a budget this is the paper's program; with sizes as the objective and
    losses as a budget, its other formulation.

    Args:
        objective: Layer -> candidate -> what is added up and minimised; may be negative. A layer whose
            candidate is given has a single one.
        budgets: Limits, whose tables have the same layers and candidates.
        groups: Layers that must take the same candidate; groups with a layer in common are one.
        solver: See ``Solver``; CBC to the optimum if None.

    Returns:
        The best choice. Among equally good candidates of a layer the cheapest is taken, whatever the order of the
        tables.

    Raises:
        ValueError: If there is no layer, a layer has no candidate, tables differ in their keys, a value is not finite
            (the message names table, layer and candidate), a group names an unknown layer, or its layers have no
            candidate in common.
        InfeasibleBudgetError: If no choice keeps the budgets; states what is reachable.
        RuntimeError: If the time limit ends the search before any choice is found.

    Example:
        >>> losses = {"a": {4: 0.5, 8: 0.0}, "b": {4: 0.1, 8: 0.0}}
        >>> sizes = {"a": {4: 40, 8: 80}, "b": {4: 40, 8: 80}}
        >>> choose_candidates(losses, [Budget("bits", sizes, 120)])
        Choice(candidates={'a': 8, 'b': 4}, objective=0.1, costs={'bits': 120}, proved=True)
        >>> choose_candidates(sizes, [Budget("loss", losses, 0.2)]).objective
        120
    """
    solver = solver or Solver()
    _check(objective, budgets)
    slots = _merge(objective, budgets, groups)
    _check_reachable(slots, budgets)
    limits = [budget.limit + _ROUNDING * abs(budget.limit) for budget in budgets]
    picked, proved = _solve(slots, limits, solver)
    if picked is None:
        raise InfeasibleBudgetError(_explain(slots, budgets, limits, solver))
    chosen = {layer: candidate for slot, candidate in zip(slots, picked, strict=True) for layer in slot.layers}
    candidates = {layer: chosen[layer] for layer in objective}
    costs = {b.name: sum(b.costs[layer][candidate] for layer, candidate in candidates.items()) for b in budgets}
    total = sum(objective[layer][candidate] for layer, candidate in candidates.items())
    return Choice(candidates, total, costs, proved)


def _check(objective: Table[Candidate], budgets: Sequence[Budget[Candidate]]) -> None:
    if not objective:
        raise ValueError("There is no layer to choose bits for.")
    for name, table in [("objective", objective), *((budget.name, budget.costs) for budget in budgets)]:
        if objective.keys() != table.keys():
            raise ValueError(
                f"objective and {name} name different layers: {', '.join(sorted(objective.keys() ^ table.keys()))}."
            )
        for layer, of_layer in table.items():
            if not of_layer:
                raise ValueError(f"{layer}: there is no candidate.")
            if of_layer.keys() != objective[layer].keys():
                raise ValueError(f"{layer}: objective and {name} have different candidates.")
            for candidate, value in of_layer.items():
                if not math.isfinite(value):
                    raise ValueError(f"{layer} at {candidate}: the {name} is {value}; it must be a finite number.")
    for budget in budgets:
        if math.isnan(budget.limit):
            raise ValueError(f"The limit of {budget.name} is not a number.")


def merge_groups(layers: Iterable[str], groups: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """All layers in groups that have none in common, in the order of names; a layer in no group is one by itself.

    Raises:
        ValueError: If a group is empty or names an unknown layer.

    Example:
        >>> merge_groups(["a", "b", "c", "d"], [["a", "c"], ["c", "d"]])
        [('a', 'c', 'd'), ('b',)]
    """
    slot_of = {layer: {layer} for layer in layers}
    for group in groups:
        if not group:
            raise ValueError("groups: a group is empty; name the layers that must agree.")
        for layer in group:
            if layer not in slot_of:
                raise ValueError(f"groups: {layer!r} is no layer of the table; these are: {', '.join(slot_of)}.")
        together = set().union(*(slot_of[layer] for layer in group))
        for layer in together:
            slot_of[layer] = together
    return sorted({tuple(sorted(slot)) for slot in slot_of.values()})


def _merge(
    objective: Table[Candidate], budgets: Sequence[Budget[Candidate]], groups: Iterable[Sequence[str]]
) -> list[_Slot[Candidate]]:
    """A slot for each group and each single layer, in the order of names; tables are summed over a slot's layers."""
    slots = []
    for layers in merge_groups(objective, groups):
        common = [c for c in objective[layers[0]] if all(c in objective[layer] for layer in layers)]
        if not common:
            raise ValueError(f"groups: {', '.join(layers)} must agree, but have no candidate in common.")
        tables = [objective, *(budget.costs for budget in budgets)]
        slots.append(_Slot(layers, {c: tuple(sum(t[layer][c] for layer in layers) for t in tables) for c in common}))
    return slots


def _least(slots: Sequence[_Slot[Candidate]], column: int) -> list[float]:
    return [min(values[column] for values in slot.options.values()) for slot in slots]


def _check_reachable(slots: Sequence[_Slot[Candidate]], budgets: Sequence[Budget[Candidate]]) -> None:
    """Raise if a budget cannot be kept even alone."""
    for column, budget in enumerate(budgets, start=1):
        least = sum(_least(slots, column))
        if budget.limit < least - _ROUNDING * abs(least):
            greatest = sum(max(values[column] for values in slot.options.values()) for slot in slots)
            raise InfeasibleBudgetError(
                f"{budget.name}={budget.limit:.6g} is out of reach: with these candidates it can be {_enough(least)} "
                f"to {_enough(greatest)}. Raise it, or add a cheaper candidate."
            )


def _enough(limit: float) -> str:
    """A limit in six digits, rounded up: given as a budget it can be kept."""
    exact = Decimal(limit)
    return f"{float(exact.quantize(Decimal((0, (1,), exact.adjusted() - 5)), ROUND_CEILING)):.6g}"


def _affordable(slots: Sequence[_Slot[Candidate]], limits: Sequence[float]) -> list[_Slot[Candidate]]:
    """The slots with the candidates that fit if all other slots take their cheapest."""
    kept = [dict(slot.options) for slot in slots]
    for column, limit in enumerate(limits, start=1):
        least = _least(slots, column)
        room = limit + _ROUNDING * abs(limit) - sum(least)
        kept = [
            {candidate: values for candidate, values in options.items() if values[column] <= room + low}
            for options, low in zip(kept, least, strict=True)
        ]
    return [_Slot(slot.layers, options) for slot, options in zip(slots, kept, strict=True)]


def _undominated(options: Mapping[Candidate, tuple[float, ...]]) -> dict[Candidate, tuple[float, ...]]:
    """Candidates that no other one is at least as good as, in the objective and every cost; of equals the first by
    name."""
    kept: dict[Candidate, tuple[float, ...]] = {}
    for candidate, values in sorted(options.items(), key=lambda option: (option[1], repr(option[0]))):
        if not any(all(a <= b for a, b in zip(better, values, strict=True)) for better in kept.values()):
            kept[candidate] = values
    return kept


def _solve(
    slots: Sequence[_Slot[Candidate]], limits: Sequence[float], solver: Solver
) -> tuple[list[Candidate] | None, bool]:
    """The candidate of each slot, or None if there is no choice within the limits; and whether that is proved.

    A solver's tolerances hide differences that are small beside the greatest value. So what is worse by itself than a
    whole solution is left out, and the rest is solved again on its own, finer scale.
    """
    slots = [_Slot(slot.layers, _undominated(slot.options)) for slot in _affordable(slots, limits)]
    if not all(slot.options for slot in slots):
        return None, True
    while True:
        picked, proved = _solve_once(slots, limits, solver)
        if picked is None or not proved:
            return picked, proved
        least = _least(slots, 0)
        excess = math.fsum(s.options[c][0] - low for s, c, low in zip(slots, picked, least, strict=True))
        finer = [
            _Slot(s.layers, {c: values for c, values in s.options.items() if values[0] - low <= excess})
            for s, low in zip(slots, least, strict=True)
        ]
        if _span(finer) >= _span(slots) / _FINER:
            return picked, proved
        slots = finer


def _span(slots: Sequence[_Slot[Candidate]]) -> float:
    """How far apart the least and the greatest objective are."""
    return math.fsum(max(v[0] for v in slot.options.values()) for slot in slots) - math.fsum(_least(slots, 0))


def _solve_once(
    slots: Sequence[_Slot[Candidate]], limits: Sequence[float], solver: Solver
) -> tuple[list[Candidate] | None, bool]:
    """Solve the program as it is."""
    spare = [limit - sum(_least(slots, column)) for column, limit in enumerate(limits, start=1)]
    if any(room < -_ROUNDING * abs(limit) for room, limit in zip(spare, limits, strict=True)):
        return None, True
    program = pulp.LpProblem("bit_allocation", pulp.LpMinimize)
    picks = [
        {candidate: pulp.LpVariable(f"pick_{i}_{j}", cat="Binary") for j, candidate in enumerate(slot.options)}
        for i, slot in enumerate(slots)
    ]

    def weighted(column: int, unit: float) -> Any:
        """Scaled sum of a column above its least value."""
        return pulp.LpAffineExpression(
            [
                (pick, (slot.options[candidate][column] - least) / unit)
                for slot, of_slot, least in zip(slots, picks, _least(slots, column), strict=True)
                for candidate, pick in of_slot.items()
            ]
        )

    program += weighted(0, (_span(slots) or 1.0) / _SCALE)
    for column, (room, limit) in enumerate(zip(spare, limits, strict=True), start=1):
        unit = (max(room, _ROUNDING * abs(limit)) or 1.0) / _SCALE
        program += weighted(column, unit) <= _SCALE
    for of_slot in picks:
        program += pulp.lpSum(of_slot.values()) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*PuLP 4.0.*", DeprecationWarning)
        status = program.solve(solver.make())
    if status == pulp.LpStatusInfeasible:
        return None, True
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise RuntimeError(
            f"{solver.name} found no choice ({pulp.LpStatus[status]}) within time_limit={solver.time_limit} seconds: "
            "raise it, or try another solver."
        )
    # Binary variables come back as floats: the greatest of a slot is the pick.
    chosen = [max(of_slot, key=lambda candidate: of_slot[candidate].value() or 0.0) for of_slot in picks]
    return chosen, bool(program.sol_status == pulp.LpSolutionOptimal)


def _explain(
    slots: Sequence[_Slot[Candidate]], budgets: Sequence[Budget[Candidate]], limits: Sequence[float], solver: Solver
) -> str:
    """Why budgets that can each be kept cannot be kept together."""
    reachable = []
    for column, budget in enumerate(budgets, start=1):
        others = [i for i in range(1, len(budgets) + 1) if i != column]
        turned = [
            _Slot(slot.layers, {c: (v[column], *(v[i] for i in others)) for c, v in slot.options.items()})
            for slot in slots
        ]
        picked, _ = _solve(turned, [limits[i - 1] for i in others], solver)
        if picked is not None:
            least = sum(slot.options[candidate][0] for slot, candidate in zip(turned, picked, strict=True))
            greatest = sum(max(values[column] for values in slot.options.values()) for slot in slots)
            reachable.append(f"{budget.name} from {_enough(least)}, if the others are kept, to {_enough(greatest)}")
    wanted = ", ".join(f"{budget.name}={budget.limit:.6g}" for budget in budgets)
    detail = "; ".join(reachable) or "no budget can be kept together with the others"
    return f"No choice of candidates keeps all budgets ({wanted}). Reachable: {detail}."
