"""Bit allocation over a whole model: measure, solve, check by the true loss, apply."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.losses import Loss
from ..calibration.steps import Steps, untold
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits
from .check import Assignment, improve
from .integer_program import InfeasibleBudgetError
from .outcome import Allocation, Point, Sweep
from .problem import Goal, Problem
from .sensitivity import Measurement, base_bits, describe_conditions, keep_states, measure_sensitivity
from .table import Conditions, SensitivityTable, read_table

log = logging.getLogger(__name__)

Evaluate = Callable[[], Mapping[str, float]]

# By which factor the limit of the predicted loss is lowered when the measured one is above the user's.
_TIGHTER = 0.8


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
    steps: Steps = untold,
) -> Allocation:
    """Give each free layer its own width, in place; where that fails, the layers are as they were.

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
        steps: Told of each measurement of a sensitivity.

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
        problem.solve({name: limit for name, limit in limits.items() if name != "loss"}, "compression")
    initial = {name: network.layers[name].bits for name in network.free_layers}
    keep_states(network)
    try:
        loss = Loss(network, calibration, measurement.metric, measurement.samples)
        if measurement.again is None:
            table = measure_sensitivity(network, loss, candidates, measurement.path, store, steps)
            model = Model(network, loss, table.base_loss)
        else:
            present = describe_conditions(network, loss, base_bits(candidates))
            table = _take_again(measurement.again, present, problem)
            model = Model(network, loss, table.base_loss)
            if table.conditions != present:
                log.warning(
                    "%s was measured with other states of the layers, or on other samples: the solution is not checked "
                    "by its true loss, which is that of the present states.",
                    measurement.again,
                )
                checks, model = 0, Model(network, loss, _base_loss(network, loss, base_bits(candidates)))
        problem.set_losses(table)
        curve, uniform = [], []
        for limits in budgets:
            bits, measured, proved = _best(problem, limits, model.measure, checks)
            label = f"{limits.get('compression', goal.minimise)}"
            curve.append(_point(problem, model, label, bits, measured, proved, evaluate if sweep.compression else None))
        for candidate in candidates if sweep.compression else ():
            bits = problem.uniform(candidate)
            label = "W{}A{}".format(*candidate)
            uniform.append(_point(problem, model, label, bits, model.measure(bits), True, evaluate))
        chosen = sweep.pick(curve) if sweep.compression else curve[0]
        model.apply(chosen.bits)
    except BaseException:
        for name, widths in initial.items():
            network.layers[name].take(widths)
        raise
    return Allocation(chosen, curve, uniform, table)


@dataclass
class Model:
    """The model whose widths are being chosen, and its true losses, each measured once.

    Args:
        network: Its layers are put into the states for each choice.
        loss: What is measured.
        base_loss: With all free layers at the base.
    """

    network: QuantizedNetwork
    loss: Loss
    base_loss: float
    _measured: dict[tuple[Bits, ...], float] = field(default_factory=dict)

    def apply(self, bits: Assignment) -> None:
        """Give the free layers these widths."""
        for name in self.network.free_layers:
            if self.network.layers[name].bits != bits[name]:
                self.network.layers[name].take(bits[name])

    def measure(self, bits: Assignment) -> float:
        """Rise of the true loss over the base; infinite where it is not a number."""
        key = tuple(bits[name] for name in self.network.free_layers)
        if key not in self._measured:
            self.apply(bits)
            rise = self.loss() - self.base_loss
            self._measured[key] = math.inf if math.isnan(rise) else rise
        return self._measured[key]


def _base_loss(network: QuantizedNetwork, loss: Loss, base: Bits) -> float:
    """Loss of the present states at the base."""
    for name in network.free_layers:
        network.layers[name].take(base)
    return loss()


def _point(
    problem: Problem,
    model: Model,
    label: str,
    bits: Assignment,
    measured: float,
    proved: bool,
    evaluate: Evaluate | None,
) -> Point:
    metrics: dict[str, float] = {}
    if evaluate is not None:
        model.apply(bits)
        metrics = dict(evaluate())
    costs = {name: problem.total(name, bits) for name in problem.costs}
    free = {name: bits[name] for name in problem.free}
    return Point(label, free, costs["compression"], problem.total("loss", bits), measured, costs, metrics, proved)


def _best(
    problem: Problem, limits: Mapping[str, float], measure: Callable[[Assignment], float], checks: int
) -> tuple[Assignment, float, bool]:
    """The program's solution, checked by its true loss; and whether the solver had proved it."""
    choice = problem.solve(limits)
    if not choice.proved:
        log.warning("time_limit ended the search: a better choice may exist.")
    if problem.goal.minimise == "loss":
        return *improve(problem, choice.candidates, limits, measure, checks), choice.proved
    # The cheapest model is wanted: only its loss has to be right.
    wanted = limits["loss"]
    limit = wanted
    for _ in range(checks):
        if (measured := measure(choice.candidates)) <= wanted:
            return choice.candidates, measured, choice.proved
        limit = min(_TIGHTER * limit, problem.total("loss", choice.candidates) * (1 - 1e-6))
        try:
            choice = problem.solve({**limits, "loss": limit})
        except InfeasibleBudgetError:
            break
    # What is left is the model of least loss that the other budgets allow.
    others = {name: value for name, value in limits.items() if name != "loss"}
    last = choice if checks == 0 else problem.solve(others, "loss")
    measured = measure(last.candidates)
    if checks and measured > wanted:
        raise InfeasibleBudgetError(
            f"max_loss={wanted:.6g} is out of reach: the model of least predicted loss measures {measured:.6g} above "
            "the base. Raise it, allow wider candidates, or loosen the other budgets."
        )
    return last.candidates, measured, last.proved


def _take_again(path: Path, wanted: Conditions, problem: Problem) -> SensitivityTable:
    """A table from a file, if it fits the model and the candidates."""
    table = read_table(path)
    if table.conditions.model != wanted.model or table.losses.keys() - problem.options.keys():
        raise ValueError(
            f"{path} was measured on another model (digest {table.conditions.model}, this one's is {wanted.model}): "
            "measure this one, without sensitivity=."
        )
    for what in ("metric", "base"):
        there, here = getattr(table.conditions, what), getattr(wanted, what)
        if there != here:
            raise ValueError(f"{path} was measured with {what} {there}, this run has {here}: measure it anew.")
    missing = {
        name: [bits for bits in problem.options[name] if bits != wanted.base and bits not in table.losses.get(name, {})]
        for name in problem.free
    }
    if lacking := {name: bits for name, bits in missing.items() if bits}:
        raise ValueError(f"{path} lacks measurements: {lacking}. Measure it anew, or leave those candidates out.")
    return table
