"""Bit allocation over a whole model: measure, solve, check by the true loss, apply."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.losses import Loss
from ..calibration.progress import ProgressCallback, no_progress
from ..network.network import QuantizedNetwork
from ..network.trial import trial
from ..quantization.spec import BitWidths, LayerConfig
from .check import Assignment, improve
from .integer_program import InfeasibleBudgetError
from .options import DEFAULT_COMPRESSION, AllocationOptions
from .outcome import Allocation, Point
from .problem import Problem
from .sensitivity import SensitivityOptions, base_bits, describe_conditions, keep_states, measure_sensitivity
from .table import Conditions, SensitivityTable, read_table

log = logging.getLogger(__name__)

Evaluate = Callable[[], Mapping[str, float]]

# By which factor the limit of the predicted loss is lowered when the measured one is above the user's.
_TIGHTER = 0.8


def allocate(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: AllocationOptions | None = None,
    store: ActivationStore | None = None,
    evaluate: Evaluate | None = None,
    progress: ProgressCallback = no_progress,
    table_path: str | Path | None = None,
) -> Allocation:
    """Give each searchable layer its own bit-widths, in place; where that fails, the layers are as they were.

    Layers whose bit-widths are pinned (first, last, overrides) keep them and count against the budgets, and so do
    quantizable layers that stay in float, with 32 bits.

    Args:
        network: Calibrated network.
        calibration: Calibration set.
        options: See ``AllocationOptions``; ``output_folder`` and ``reset_to_float`` are left to the caller.
        store: Store of captured activations while measuring; all in memory if None.
        evaluate: The user's own evaluation of the model as it is; called for each point of a sweep.
        progress: Progress callback, called after each measurement of a sensitivity.
        table_path: CSV file for the measurements in place of ``options.table``.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
        InfeasibleBudgetError: If no choice keeps the budgets; states what is reachable.
        ValueError: If no layer is searchable, a measured loss is not finite (names layer and bit-widths), a table to be
            reused is of another model, or no point of a sweep meets the rule.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(8, 4))
        >>> network = QuantizedNetwork(model, QuantizationScheme(activation_bits=None, edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> outcome = allocate(network, calibration, AllocationOptions(compression=0.2, candidates=[4, 8]))
        >>> sorted(bits.label for bits in outcome.chosen.bits.values())
        ['W4', 'W8']
        >>> outcome.chosen.compression
        0.1875
    """
    if not network.calibrated:
        raise RuntimeError("Bit allocation measures the quantized model: run Calibration first.")
    calibration.require()
    network.warn_of_equalization()
    options = options or AllocationOptions()
    problem, budgets = state_problem(network, calibration, options)
    candidates, constraints, sweep = problem.candidates, options.constraints, options.sweep
    if options.has_default_budget and budgets[0]["compression"] > DEFAULT_COMPRESSION:
        log.warning(
            "compression=%g, the default, is out of this model's reach: the budget is %.4g, half-way between the least "
            "and the most that it can come to. Give allocation.compression, or add narrower candidates.",
            *(DEFAULT_COMPRESSION, budgets[0]["compression"]),
        )
    keep_states(network)
    with trial([network.layers[name] for name in network.searchable_layers]):
        measurement = options.sensitivity_options(table_path)
        loss = Loss(network, calibration, measurement.metric, measurement.samples)
        predictor = loss.predictor()
        table, base_loss, comparable = _sensitivities(network, predictor, problem, measurement, store, progress)
        searched = model = Model(network, predictor, base_loss)
        if predictor is not loss:
            model, comparable = Model(network, loss, _loss_at_base(network, loss, problem)), True
        # Alternatives are told apart by what predicts them, but for a limit, which is one of the loss itself.
        measure = searched.measure if constraints.minimise == "loss" else model.measure
        checks = options.checks if comparable else 0
        problem.set_losses(table)
        curve, uniform = [], []
        for limits in budgets:
            bits, measured, proved = _best(problem, limits, measure, checks, predictor is loss)
            measured = measured if predictor is loss else model.measure(bits)
            label = f"{limits.get('compression', constraints.minimise)}"
            curve.append(_point(problem, model, label, bits, measured, proved, evaluate if sweep.compression else None))
        for candidate in candidates if sweep.compression else ():
            bits = problem.uniform(candidate)
            uniform.append(_point(problem, model, candidate.label, bits, model.measure(bits), True, evaluate))
        chosen = sweep.pick(curve) if sweep.compression else curve[0]
        model.apply(chosen.bits)
    if predictor is not loss:
        # What the program has added up is another loss, in another unit.
        curve, uniform = ([replace(point, predicted_loss=math.nan) for point in of] for of in (curve, uniform))
        chosen = replace(chosen, predicted_loss=math.nan)
    return Allocation(chosen, curve, uniform, table, loss.name)


def state_problem(
    network: QuantizedNetwork, calibration: CalibrationSet, options: AllocationOptions
) -> tuple[Problem, list[dict[str, float]]]:
    """The problem, and the limits of each of its solutions, once it is certain that there is one: what cannot be solved
    must show before hours of work.

    Args:
        network: Network that has been prepared; it need not be calibrated.
        calibration: Calibration set with at least one batch.
        options: See ``allocate``.

    Raises:
        ValueError: If no layer is free, or the constraints do not fit the model; see ``allocate``.
        InfeasibleBudgetError: If no choice keeps the budgets of costs.

    Example:
        See ``allocate``.
    """
    if not network.searchable_layers:
        raise ValueError("No layer's bit-widths are free to be chosen: overrides and edge_bits pin them all.")
    candidates, constraints, sweep = options.bit_widths(network.scheme), options.constraints, options.sweep
    if set(constraints.limits) == {"compression"} and all(candidate.weight is None for candidate in candidates):
        raise ValueError(
            "No candidate quantizes weights (weight_bits=None), so there is nothing that compression could limit: give "
            "a budget of bit_operations or activation_bytes."
        )
    problem = Problem(network, calibration, candidates, constraints)
    budgets = [{**constraints.limits, "compression": value} for value in sweep.compression]
    budgets = budgets or [dict(constraints.limits)]
    if options.has_default_budget:
        budgets = [{"compression": _reachable(problem, DEFAULT_COMPRESSION)}]
    for limits in budgets:
        problem.solve({name: limit for name, limit in limits.items() if name != "loss"}, "compression")
    return problem, budgets


def _reachable(problem: Problem, compression: float) -> float:
    """The compression, or one half-way between the least and the most that the candidates allow if it is less than all
    of these."""
    least, most = (
        sum(pick(of_layer.values()) for of_layer in problem.costs["compression"].values()) for pick in (min, max)
    )
    return compression if compression >= least else (least + most) / 2


def _sensitivities(
    network: QuantizedNetwork,
    loss: Loss,
    problem: Problem,
    options: SensitivityOptions,
    store: ActivationStore | None,
    progress: ProgressCallback,
) -> tuple[SensitivityTable, float, bool]:
    """The table, measured or reused; the loss of the present states at the base; and whether both tell of the same."""
    base = base_bits(problem.candidates)
    if options.reuse is None:
        table = measure_sensitivity(network, loss, problem.candidates, options.path, store, progress)
        return table, table.base_loss, True
    present = describe_conditions(network, loss, base)
    table = _read_again(options.reuse, present, problem)
    if table.conditions == present:
        return table, table.base_loss, True
    log.warning(
        "%s was measured with other states of the layers, or on other samples: the solution is not checked by its true "
        "loss, which is that of the present states.",
        options.reuse,
    )
    return table, _loss_at_base(network, loss, problem), False


def _loss_at_base(network: QuantizedNetwork, loss: Loss, problem: Problem) -> float:
    base = base_bits(problem.candidates)
    for name in network.searchable_layers:
        network.switch(name, base)
    return loss()


@dataclass
class Model:
    """The model whose bit-widths are being chosen, and its true losses, each measured once.

    Args:
        network: Its layers are switched to each choice.
        loss: What is measured.
        base_loss: Loss with all searchable layers at the base.

    Example:
        See ``allocate``.
    """

    network: QuantizedNetwork
    loss: Loss
    base_loss: float
    _measured: dict[tuple[LayerConfig, ...], float] = field(default_factory=dict)

    def apply(self, bits: Assignment) -> None:
        """Give the searchable layers these bit-widths."""
        for name, config in self._configs(bits).items():
            if self.network.layers[name].config != config:
                self.network.layers[name].switch(config)

    def measure(self, bits: Assignment) -> float:
        """Rise of the true loss over the base; infinite where it is not a number."""
        key = tuple(self._configs(bits).values())
        if key not in self._measured:
            self.apply(bits)
            rise = self.loss() - self.base_loss
            self._measured[key] = math.inf if math.isnan(rise) else rise
        return self._measured[key]

    def _configs(self, bits: Assignment) -> dict[str, LayerConfig]:
        return {name: self.network.config_for(name, bits[name]) for name in self.network.searchable_layers}


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
    chosen = {name: bits[name] for name in problem.searchable}
    return Point(label, chosen, costs["compression"], problem.total("loss", bits), measured, costs, metrics, proved)


def _best(
    problem: Problem,
    limits: Mapping[str, float],
    measure: Callable[[Assignment], float],
    checks: int,
    comparable: bool = True,
) -> tuple[Mapping[str, BitWidths], float, bool]:
    """The program's solution, checked by its true loss; and whether the solver had proved it."""
    others = {name: value for name, value in limits.items() if name != "loss"}
    # A limit of the measured loss is none of predictions that are another one's.
    choice = problem.solve(limits if comparable else others)
    if not choice.proved:
        log.warning("time_limit ended the search: a better choice may exist.")
    if problem.constraints.minimise == "loss":
        return *improve(problem, choice.candidates, limits, measure, checks), choice.proved
    # The cheapest model is wanted: only its loss has to be right.
    wanted = limits["loss"]
    limit = wanted if comparable else problem.total("loss", choice.candidates)
    for _ in range(checks):
        if (measured := measure(choice.candidates)) <= wanted:
            return choice.candidates, measured, choice.proved
        limit = min(_TIGHTER * limit, problem.total("loss", choice.candidates) * (1 - 1e-6))
        try:
            choice = problem.solve({**limits, "loss": limit})
        except InfeasibleBudgetError:
            break
    # What is left is the model of least loss that the other budgets allow.
    last = choice if checks == 0 else problem.solve(others, "loss")
    measured = measure(last.candidates)
    if checks and measured > wanted:
        raise InfeasibleBudgetError(
            f"max_loss={wanted:.6g} is out of reach: the model of least predicted loss measures {measured:.6g} above "
            "the base. Raise it, allow wider candidates, or loosen the other budgets."
        )
    return last.candidates, measured, last.proved


def _read_again(path: Path, wanted: Conditions, problem: Problem) -> SensitivityTable:
    """A table from a file, if it fits the model and the candidates."""
    table = read_table(path)
    if unknown := sorted(table.losses.keys() - problem.options.keys()):
        raise ValueError(
            f"{path} was measured on another model: this one has no quantizable layer {', '.join(unknown[:3])}. "
            "Measure this one, without sensitivity=."
        )
    if table.conditions.model != wanted.model:
        raise ValueError(
            f"{path} was measured on another model (digest {table.conditions.model}, this one's is {wanted.model}): "
            "measure this one, without sensitivity=."
        )
    compared: Sequence[tuple[str, str, str]] = (
        ("metric", table.conditions.metric, wanted.metric),
        ("base", table.conditions.base.label, wanted.base.label),
    )
    for what, there, here in compared:
        if there != here:
            raise ValueError(f"{path} was measured with {what} {there}, this run has {here}: measure it anew.")
    lacking = {
        name: [
            bits.label
            for bits in problem.options[name]
            if bits != wanted.base and bits not in table.losses.get(name, {})
        ]
        for name in problem.searchable
    }
    if lacking := {name: labels for name, labels in lacking.items() if labels}:
        raise ValueError(f"{path} lacks measurements: {lacking}. Measure it anew, or leave those candidates out.")
    return table
