"""The integer program that picks one candidate for each layer (Hubara et al. 2021), on tables alone."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import pulp

Candidate = TypeVar("Candidate", bound=Hashable)


@dataclass(frozen=True)
class Choice(Generic[Candidate]):
    """Solution of the program.

    Args:
        candidates: The chosen candidate of each layer.
        predicted_loss: Sum of the chosen losses.
        cost: Sum of the chosen costs, at most the budget.
    """

    candidates: dict[str, Candidate]
    predicted_loss: float
    cost: float


class InfeasibleBudgetError(ValueError):
    """No choice of candidates fits the budget."""


def choose_candidates(
    losses: Mapping[str, Mapping[Candidate, float]], costs: Mapping[str, Mapping[Candidate, float]], budget: float
) -> Choice[Candidate]:
    """Least summed loss under a budget on the summed cost, with exactly one candidate a layer.

    Args:
        losses: Layer -> candidate -> rise of the loss if only this layer takes the candidate. May be negative.
        costs: The same keys -> cost, at least 0 (bits of the weights, say).
        budget: Greatest allowed sum of costs, in the unit of ``costs``.

    Returns:
        The optimum (of equals, the one CBC finds with a single thread, which is deterministic).

    Raises:
        ValueError: If there is no layer, a layer has no candidate, the tables' keys differ, or a value is not finite;
            the message names layer and candidate.
        InfeasibleBudgetError: If even the cheapest choice is over the budget; states the reachable range.
        RuntimeError: If the solver stops without a proved optimum.

    Example:
        >>> losses = {"a": {4: 0.5, 8: 0.0}, "b": {4: 0.1, 8: 0.0}}
        >>> costs = {"a": {4: 40, 8: 80}, "b": {4: 40, 8: 80}}
        >>> choose_candidates(losses, costs, budget=120)
        Choice(candidates={'a': 8, 'b': 4}, predicted_loss=0.1, cost=120)
    """
    _check(losses, costs)
    least = sum(min(of_layer.values()) for of_layer in costs.values())
    greatest = sum(max(of_layer.values()) for of_layer in costs.values())
    if not budget >= least * (1 - 1e-12):
        raise InfeasibleBudgetError(
            f"No choice of candidates costs at most {budget:.6g}: the reachable range is {least:.6g} to {greatest:.6g}."
        )
    # CBC's tolerances are absolute, so both tables are brought to the order of 1.
    loss_unit = max((abs(loss) for of_layer in losses.values() for loss in of_layer.values()), default=0.0) or 1.0
    cost_unit = greatest or 1.0
    program = pulp.LpProblem("bit_allocation", pulp.LpMinimize)
    picks = {
        (layer, candidate): pulp.LpVariable(f"pick_{i}_{j}", cat="Binary")
        for i, (layer, of_layer) in enumerate(losses.items())
        for j, candidate in enumerate(of_layer)
    }
    program += pulp.lpSum(losses[layer][candidate] / loss_unit * pick for (layer, candidate), pick in picks.items())
    program += (
        pulp.lpSum(costs[layer][candidate] / cost_unit * pick for (layer, candidate), pick in picks.items())
        <= budget / cost_unit
    )
    for layer, of_layer in losses.items():
        program += pulp.lpSum(picks[layer, candidate] for candidate in of_layer) == 1
    status = program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=0.0, options=["randomSeed 0"]))
    if pulp.LpStatus[status] != "Optimal":
        raise RuntimeError(f"The solver stopped with status {pulp.LpStatus[status]!r}; try another budget.")
    # Binary variables come back as floats: the greatest of a layer is the pick.
    chosen = {
        layer: max(of_layer, key=lambda candidate: picks[layer, candidate].value() or 0.0)
        for layer, of_layer in losses.items()
    }
    return Choice(
        chosen,
        sum(losses[layer][candidate] for layer, candidate in chosen.items()),
        sum(costs[layer][candidate] for layer, candidate in chosen.items()),
    )


def _check(losses: Mapping[str, Mapping[Candidate, float]], costs: Mapping[str, Mapping[Candidate, float]]) -> None:
    if not losses:
        raise ValueError("There is no layer to choose bits for.")
    if losses.keys() != costs.keys():
        raise ValueError(f"losses and costs name different layers: {sorted(losses.keys() ^ costs.keys())}.")
    for layer, of_layer in losses.items():
        if not of_layer:
            raise ValueError(f"{layer}: there is no candidate.")
        if of_layer.keys() != costs[layer].keys():
            raise ValueError(f"{layer}: losses and costs have different candidates.")
        for what, table in (("loss", of_layer), ("cost", costs[layer])):
            for candidate, value in table.items():
                if not math.isfinite(value):
                    raise ValueError(f"{layer} at {candidate}: the {what} is {value}; it must be a finite number.")
