"""Bit allocation over a whole model: measure, solve, check by the true loss, apply."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.losses import Loss
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits
from .check import Assignment, improve
from .problem import Goal, Problem
from .sensitivity import Measurement, base_bits, describe_conditions, keep_states, measure_sensitivity
from .table import SensitivityTable, read_table

log = logging.getLogger(__name__)

Evaluate = Callable[[], Mapping[str, float]]

# By which factor the limit of the predicted loss is lowered when the measured one is above the user's.
_TIGHTER = 0.8


@dataclass(frozen=True)
class Point:
    """One model of the trade-off.

    Args:
        label: ``"0.13"`` for the budget it was solved for, ``"W4A8"`` for a uniform width.
        bits: Width of each free layer.
        compression: Bits of the weights over 32 bits each.
        predicted_loss: Sum of the single-layer losses.
        measured_loss: True rise of the loss over the base.
        costs: All costs that the goal names.
        metrics: What the user's own evaluation gave, if there is one.
    """

    label: str
    bits: dict[str, Bits]
    compression: float
    predicted_loss: float
    measured_loss: float
    costs: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """Outcome of a bit allocation.

    Args:
        chosen: The model as it now is.
        curve: All solved points, in the order of the budgets; one without a sweep.
        uniform: Every candidate in all free layers, for comparison (with a sweep only).
        sensitivity: The table that was solved.
    """

    chosen: Point
    curve: list[Point]
    uniform: list[Point]
    sensitivity: SensitivityTable


@dataclass(frozen=True)
class Sweep:
    """Several budgets solved from one table, and the rule by which one of the points is taken.

    Args:
        compression: The budgets, each above 0 and at most 1; none for no sweep.
        under: Only points of at most this compression are taken; None for all.
        max_degradation: Take the smallest point whose measured loss lies at most this much above the base; None for the
            one of least loss.

    Raises:
        ValueError: If a budget is out of its range, or there is a rule but no sweep.
    """

    compression: Sequence[float] = ()
    under: float | None = None
    max_degradation: float | None = None

    def __post_init__(self) -> None:
        for value in self.compression:
            if not 0 < value <= 1:
                raise ValueError(f"compression must be above 0 and at most 1, got {value}.")
        if not self.compression and (self.under, self.max_degradation) != (None, None):
            raise ValueError("pick_under and max_degradation pick a point of a sweep: give compression as a list.")

    def pick(self, curve: Sequence[Point]) -> Point:
        """Apply the rule.

        Raises:
            ValueError: If no point meets it; states what there is.
        """
        points = sorted(curve, key=lambda point: point.compression)
        meeting = [
            point
            for point in points
            if (self.under is None or point.compression <= self.under * (1 + 1e-9))
            and (self.max_degradation is None or point.measured_loss <= self.max_degradation)
        ]
        if not meeting:
            there = ", ".join(f"{point.compression:.4f}: {point.measured_loss:.4g}" for point in points)
            raise ValueError(
                f"No point of the sweep has a compression of at most {self.under} and a degradation of at most "
                f"{self.max_degradation}. Measured (compression: degradation): {there}."
            )
        return meeting[0] if self.max_degradation is not None else min(meeting, key=lambda point: point.measured_loss)


def allocate(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    candidates: Sequence[Bits],
    goal: Goal,
    measurement: Measurement | None = None,
    sweep: Sweep | None = None,
    checks: int = 16,
    store: ActivationStore | None = None,
    evaluate: Evaluate | None = None,
) -> Allocation:
    """Give each free layer its own width, in place.

    Layers whose width is fixed (first, last, overrides) keep it and count against the budgets, and so do quantizable
    layers that were left float, with 32 bits.

    Args:
        network: Calibrated.
        calibration: The samples.
        candidates: ``(weight_bits, activation_bits)`` pairs.
        goal: What is minimised and limited.
        measurement: What is measured, and on which samples; see ``Measurement``.
        sweep: Budgets of ``compression`` to solve for, in place of the goal's one.
        checks: How many alternatives to each solution have their true loss measured, see ``improve``.
        store: Where activations are kept while measuring.
        evaluate: The user's own evaluation of the model as it is; called for each point of a sweep.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
        InfeasibleBudgetError: If no choice keeps the budgets; states what is reachable.
        ValueError: If no layer is free, a measured loss is not finite (names layer and width), a table to be
            taken again is of another model, or no point of a sweep meets the rule.
    """
    if not network.calibrated:
        raise RuntimeError("Bit allocation measures the quantized model: run Calibration first.")
    calibration.require()
    if not network.free_layers:
        raise ValueError("No layer's width is free: overrides and edge_bits fix them all.")
    measurement, sweep = measurement or Measurement(), sweep or Sweep()
    problem = Problem(network, calibration, candidates, goal)
    budgets = [{**goal.limits, "compression": value} for value in sweep.compression] or [dict(goal.limits)]
    for limits in budgets:
        # What cannot be solved must show before hours of measuring.
        problem.solve({name: limit for name, limit in limits.items() if name != "loss"} or None)
    loss = Loss(network, calibration, measurement.metric, measurement.samples)
    if measurement.again is None:
        table = measure_sensitivity(network, loss, candidates, measurement.path, store)
    else:
        table = _take_again(measurement.again, network, loss, problem, base_bits(candidates))
        if table.conditions != describe_conditions(network, loss, base_bits(candidates)):
            log.warning(
                "%s was measured with other states of the layers, or on other samples: the solution is not checked by "
                "its true loss, which is that of the present states.",
                measurement.again,
            )
            checks = 0
    problem.set_losses(table)

    def apply(bits: Assignment) -> None:
        for name in network.free_layers:
            if network.layers[name].bits != bits[name]:
                network.layers[name].take(bits[name])

    def measure(bits: Assignment) -> float:
        apply(bits)
        return loss() - table.base_loss

    def point(label: str, bits: Assignment, measured: float) -> Point:
        apply(bits)
        costs = {name: problem.total(name, bits) for name in problem.costs}
        free = {name: bits[name] for name in problem.free}
        metrics = dict(evaluate()) if evaluate is not None and sweep.compression else {}
        return Point(label, free, costs["compression"], problem.total("loss", bits), measured, costs, metrics)

    curve = []
    for limits in budgets:
        bits, measured = _best(problem, limits, measure, checks)
        curve.append(point(f"{limits.get('compression', goal.minimise)}", bits, measured))
    uniform = []
    for candidate in candidates if sweep.compression else ():
        bits = problem.uniform(candidate)
        uniform.append(point("W{}A{}".format(*candidate), bits, measure(bits)))
    chosen = sweep.pick(curve) if sweep.compression else curve[0]
    apply({**problem.uniform(candidates[0]), **chosen.bits})
    return Allocation(chosen, curve, uniform, table)


def _best(
    problem: Problem, limits: Mapping[str, float], measure: Callable[[Assignment], float], checks: int
) -> tuple[Assignment, float]:
    """The program's solution, checked by its true loss."""
    chosen = problem.solve(limits).candidates
    if problem.goal.minimise == "loss":
        return improve(problem, chosen, limits, measure, checks)
    # The cheapest model is wanted: only its loss has to be right.
    wanted, measured = limits["loss"], measure(chosen)
    tried = [(chosen, measured)]
    limit = wanted
    while measured > wanted and len(tried) <= checks:
        limit *= _TIGHTER
        try:
            chosen = problem.solve({**limits, "loss": limit}).candidates
        except ValueError:
            break
        measured = measure(chosen)
        tried.append((chosen, measured))
    if measured > wanted:
        chosen, measured = min(tried, key=lambda choice: choice[1])
        log.warning("The measured loss stays at %.4g, above max_loss=%.4g: allow more bits.", measured, wanted)
    return chosen, measured


def _take_again(
    path: str | Path, network: QuantizedNetwork, loss: Loss, problem: Problem, base: Bits
) -> SensitivityTable:
    """A table from a file, if it fits the model and the candidates."""
    table = read_table(path)
    keep_states(network)
    wanted = describe_conditions(network, loss, base)
    if table.conditions.model != wanted.model or table.losses.keys() - network.layers.keys():
        raise ValueError(
            f"{path} was measured on another model (digest {table.conditions.model}, this one's is {wanted.model}): "
            "measure this one, without sensitivity=."
        )
    for what in ("metric", "base"):
        there, here = getattr(table.conditions, what), getattr(wanted, what)
        if there != here:
            raise ValueError(f"{path} was measured with {what} {there}, this run has {here}: measure it anew.")
    missing = {
        name: [bits for bits in problem.options[name] if bits != base and bits not in table.losses.get(name, {})]
        for name in problem.free
    }
    if lacking := {name: bits for name, bits in missing.items() if bits}:
        raise ValueError(f"{path} lacks measurements: {lacking}. Measure it anew, or leave those candidates out.")
    return table
