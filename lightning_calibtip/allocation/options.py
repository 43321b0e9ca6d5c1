"""AllocationOptions: budgets, candidates, measurement and solver of a bit allocation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..calibration.activation_store import parse_bytes
from ..calibration.divergences import Divergence
from ..calibration.losses import LossFunction
from ..calibration.utility import with_utility
from ..network.scheme import QuantizationScheme
from ..quantization.spec import FLOAT_BITS, BitWidths, parse_bit_widths
from .constraints import Constraints
from .integer_program import InfeasibleBudgetError, Solver
from .latency import LatencyTable, read_latencies
from .outcome import Sweep
from .sensitivity import SensitivityOptions

# The paper's smallest model.
DEFAULT_COMPRESSION = 0.13

# Budgets that may be given as text with a unit.
_BYTES = ("weight_bytes", "activation_bytes")


@dataclass(frozen=True)
class AllocationOptions:
    """Options of a bit allocation.

    Numbers may be given as text, since YAML reads ``2e9`` as text.

    Args:
        compression: Budget of the weight bits of the quantizable layers over 32 bits each (0.125 is 4 bits throughout),
            above 0 and at most 1. A list makes a sweep: all are solved from one table and evaluated, and one is picked.
            If None, 0.13, or half-way between the least and the most that the model can come to where 0.13 is out of
            reach; no such budget where there is another one.
        candidates: Bit-widths of 2 to 16 bits, or pairs ``(weight_bits, activation_bits)`` in which None stands for
            float; at least two. One number stands for whatever the scheme quantizes.
        weight_bytes: Budget of the weights' bytes, a number or ``"2MB"``; scales and zero points are not counted.
        bit_operations: Budget of multiply-accumulates times weight bits times activation bits (BOPs) for one sample.
        activation_bytes: Budget of the bytes of all quantized inputs for one sample, a number or ``"2MB"``.
        latency: Budget in the unit of ``latency_table``.
        latency_table: Layer -> bit-widths -> latency, or a CSV file with the columns layer, weight_bits,
            activation_bits, latency.
        budgets: Budgets of other costs by the names under which ``register_cost`` knows them.
        max_loss: Budget of the loss, as a rise over the base; with ``minimise`` other than ``"loss"``.
        minimise: ``"loss"``, ``"compression"``, ``"weight_bytes"``, ``"bit_operations"``, ``"activation_bytes"``,
            ``"latency"`` or the name of another registered cost.
        groups: Lists of names or patterns of layers that must have the same bit-widths.
        agree_on_input: Whether layers that read the same tensor must.
        agree_on_add: Whether layers whose outputs are added up must.
        metric: What is measured: ``"kl"`` to the float logits, ``"mse"`` of the outputs, what mistakes cost (a
            ``Utility``, or a mapping of its fields), another ``Divergence`` or its name, or a function
            ``metric(output, batch)``, less being better: a labelled loss, say (in YAML its import path).
        samples: Number of calibration samples to measure on; all if None.
        checks: Number of alternatives to the program's answer whose true loss is measured (with a ``Utility``, its
            divergence of decisions, see there); the best is kept.
        pick_under: Greatest compression of the point that is picked from a sweep; None for any.
        max_degradation: Greatest rise of the measured loss of the point that is picked from a sweep, which is then the
            smallest one; if None, the one of least loss is picked.
        sensitivity: CSV file of an earlier run, whose measurements are reused instead of measuring.
        table: CSV file that gets every measurement as it is made; a killed run that is repeated is resumed from it.
        output_folder: Folder for the tables and pictures of the outcome as CSV and PNG; None to write none.
        reset_to_float: Whether the layers go back to float weights and ranges alone at the bit-widths chosen, for a
            reconstruction that follows; otherwise they keep the states that reconstruction found at these bit-widths.
        solver: ``"cbc"``, or ``"highs"`` where highspy is installed.
        time_limit: Seconds for one solution of the program; None for no limit.
        gap: Relative distance from the optimum at which the solver may stop.

    Raises:
        ValueError: If an option is out of its range; the message names it, its value and the allowed range.

    Example:
        >>> options = AllocationOptions(candidates=[(4, None), (8, None)], weight_bytes="2MB", bit_operations="2e9")
        >>> options.constraints.limits
        {'weight_bytes': 2000000.0, 'bit_operations': 2000000000.0}
        >>> [bits.label for bits in options.bit_widths(QuantizationScheme())]
        ['W4', 'W8']
    """

    compression: float | Sequence[float] | None = None
    candidates: Sequence[int | Sequence[int | None]] = (4, 8)
    weight_bytes: int | str | None = None
    bit_operations: float | None = None
    activation_bytes: int | str | None = None
    latency: float | None = None
    latency_table: Mapping[str, Mapping[Any, float]] | str | Path | None = None
    budgets: Mapping[str, float] = field(default_factory=dict)
    max_loss: float | None = None
    minimise: str = "loss"
    groups: Sequence[Sequence[str]] = ()
    agree_on_input: bool = False
    agree_on_add: bool = False
    # In this order jsonargparse takes the path of a function for the function.
    metric: LossFunction | Divergence | Mapping[str, Any] | str = "kl"
    samples: int | None = None
    checks: int = 16
    pick_under: float | None = None
    max_degradation: float | None = None
    sensitivity: str | Path | None = None
    table: str | Path | None = None
    output_folder: str | Path | None = None
    reset_to_float: bool = False
    solver: str = "cbc"
    time_limit: float | None = None
    gap: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", with_utility(self.metric, "metric"))
        # Everything that is derived is checked when it is made.
        _ = self.sweep
        if isinstance(self.candidates, str) or not isinstance(self.candidates, Sequence):
            raise ValueError(f"candidates must be a list of at least two bit-widths, got {self.candidates!r}.")
        pairs = [parse_bit_widths(value, f"candidates[{i}]") for i, value in enumerate(self.candidates)]
        _distinct(pairs, self.candidates)
        _ = self.constraints
        if isinstance(self.checks, bool) or not isinstance(self.checks, int) or self.checks < 0:
            raise ValueError(f"checks must be an integer of at least 0, got {self.checks!r}.")
        self.sensitivity_options()
        predicts = isinstance(self.metric, Divergence) and self.metric.predictor() is not self.metric
        if predicts and self.max_loss is not None and self.checks == 0:
            raise ValueError(
                "checks=0 cannot keep max_loss with this metric, whose values for single layers are not added up: let "
                "some choices be measured, checks=16, say."
            )

    def bit_widths(self, scheme: QuantizationScheme) -> list[BitWidths]:
        """The candidates under a scheme, which says what a single number stands for.

        Args:
            scheme: The scheme of the model.

        Raises:
            ValueError: If fewer than two of them are different.
        """
        return _distinct([scheme.bit_widths(value, "candidates") for value in self.candidates], self.candidates)

    def check_reachable(self, scheme: QuantizationScheme) -> None:
        """Refuse a compression that no model can reach under a scheme, before there is one: the fewest bits of all
        weights are more.

        Args:
            scheme: The scheme of the model.

        Raises:
            InfeasibleBudgetError: If one of the budgets is out of reach.

        Example:
            >>> AllocationOptions(compression=0.1, candidates=[2, 8]).check_reachable(QuantizationScheme())
        """
        pinned = [scheme.bit_widths(value, "overrides") for value in (scheme.overrides or {}).values() if value]
        edges = [] if scheme.edge_bits is None else [scheme.bit_widths(scheme.edge_bits, "edge_bits")]
        least = min(bits.weight or FLOAT_BITS for bits in (*self.bit_widths(scheme), *pinned, *edges))
        if self.has_default_budget:
            return
        limit = self.constraints.limits.get("compression", 1.0)
        lowest = min([limit, *self.sweep.compression])
        if lowest < least / FLOAT_BITS:
            raise InfeasibleBudgetError(
                f"compression={lowest:g} is out of reach: with all weights at {least} bits, the fewest that "
                f"candidates, edge_bits and overrides give, it is {least / FLOAT_BITS:g}. Raise it, or add narrower "
                "candidates."
            )

    @property
    def has_default_budget(self) -> bool:
        """Whether no budget is given, so that it is a compression that may be out of a small model's reach."""
        return self.compression is None and "compression" in self.constraints.limits and not self.budgets

    @cached_property
    def sweep(self) -> Sweep:
        """Budgets of a sweep, none if there is a single budget, and the rule of picking."""
        values: list[float] = []
        if _is_list(self.compression):
            assert isinstance(self.compression, Iterable)
            values = [_number(value, "compression") for value in self.compression]
            if not values:
                raise ValueError("compression must be a number or a list with at least one, got an empty list.")
        under, degradation = (
            None if value is None else _number(value, name)
            for name, value in (("pick_under", self.pick_under), ("max_degradation", self.max_degradation))
        )
        return Sweep(values, under, degradation)

    @cached_property
    def constraints(self) -> Constraints:
        """What is minimised and limited; with a sweep, by its greatest budget."""
        own = {
            "weight_bytes": self.weight_bytes,
            "bit_operations": self.bit_operations,
            "activation_bytes": self.activation_bytes,
            "latency": self.latency,
            "loss": self.max_loss,
        }
        if self.sweep.compression:
            own["compression"] = max(self.sweep.compression)
        elif self.compression is not None:
            assert not isinstance(self.compression, Sequence) or isinstance(self.compression, str)
            own["compression"] = self.compression
        given = {name: value for name, value in own.items() if value is not None}
        for name, value in self.budgets.items():
            if name == "loss":
                raise ValueError("budgets are costs, got 'loss': give the budget of the loss as max_loss.")
            if name in given:
                raise ValueError(
                    f"{name} is given twice, as an option of its own and in budgets: leave out one of them."
                )
            given[name] = value
        limits = {name: _limit(value, name) for name, value in given.items()} or {"compression": DEFAULT_COMPRESSION}
        time_limit = None if self.time_limit is None else _number(self.time_limit, "time_limit")
        solver = Solver(self.solver, time_limit, _number(self.gap, "gap"))
        agreeing = self.groups, self.agree_on_input, self.agree_on_add
        return Constraints(limits, self.minimise, self._latencies, *agreeing, solver)

    @cached_property
    def _latencies(self) -> LatencyTable | None:
        return read_latencies(self.latency_table) if isinstance(self.latency_table, str | Path) else self.latency_table

    def sensitivity_options(self, table_path: str | Path | None = None) -> SensitivityOptions:
        """How sensitivities are measured.

        Args:
            table_path: CSV file for the measurements in place of ``table``.
        """
        path, reuse = (None if file is None else Path(file) for file in (table_path or self.table, self.sensitivity))
        return SensitivityOptions(self.metric, self.samples, path, reuse)


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _distinct(candidates: list[BitWidths], given: object) -> list[BitWidths]:
    """The candidates without repetitions, of which there must be two."""
    distinct = list(dict.fromkeys(candidates))
    if len(distinct) < 2:
        labels = f" ({', '.join(bits.label for bits in distinct)} under this scheme)" if len(candidates) > 1 else ""
        raise ValueError(f"candidates must be at least two different bit-widths, got {given!r}{labels}.")
    return distinct


def _limit(value: Any, name: str) -> float:
    return float(parse_bytes(value, name) or 0) if name in _BYTES else _number(value, name)


def _number(value: Any, name: str) -> float:
    """A number that may have been given as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}.") from None
