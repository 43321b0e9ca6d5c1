"""BitAllocation: give each layer its own width under a budget."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import override

from ..allocation.allocate import Evaluate, allocate
from ..allocation.costs import read_latencies
from ..allocation.integer_program import Solver
from ..allocation.outcome import Allocation, Sweep
from ..allocation.problem import Goal
from ..allocation.sensitivity import Measurement
from ..calibration.activation_store import ActivationStore, parse_bytes
from ..calibration.losses import LossFunction
from ..module import QuantizationModule
from ..quantization.scheme import check_pair
from ..report.allocation import allocation_exhibits
from .stage import Stage

# The paper's smallest model.
DEFAULT_COMPRESSION = 0.13


class BitAllocation(Stage):
    """Measures the loss of each layer at each candidate width and solves an integer program for the best mix.

    ``allocation`` holds the last outcome. ``evaluate``, a function without arguments that gives metrics of the model as
    it is, can be set to have each point of a sweep evaluated; ``quantize`` and the recipes set it to the user's own
    validation.

    Args:
        compression: Budget: weight bits of the quantizable layers over 32 bits each (0.125 is 4 bits throughout), above
            0 and at most 1. A list makes a sweep: all are solved from one table and evaluated, and one is picked. If
            None, 0.13, or no such budget where there is another one.
        candidates: Widths, or pairs ``(weight_bits, activation_bits)``, of 2 to 16 bits; at least two.
        weight_bytes: Budget of the weights' bytes, a number or ``"2MB"``.
        bit_operations: Budget of multiply-accumulates times weight bits times activation bits (BOPs) a sample.
        activation_bytes: Budget of the bytes of all quantized inputs a sample.
        latency: Budget in the unit of ``latency_table``.
        latency_table: Layer -> width -> latency, or a CSV file with the columns layer, weight_bits, activation_bits,
            latency.
        max_loss: Budget of the loss, as a rise over the base; with ``minimise`` other than ``"loss"``.
        minimise: ``"loss"``, ``"compression"``, ``"weight_bytes"``, ``"bit_operations"``, ``"activation_bytes"`` or
            ``"latency"``.
        groups: Lists of names or patterns of layers that must take the same width.
        agree_on_input: Whether layers that read the same tensor must.
        agree_on_add: Whether layers whose outputs are added up must.
        metric: What is measured: ``"kl"`` to the float logits, ``"mse"`` of the outputs, or a function
            ``metric(output, batch)``, less being better: a labelled loss, say.
        samples: How many calibration samples to measure on; all if None.
        checks: How many alternatives to the program's answer have their true loss measured; the best is kept.
        pick_under: Of a sweep, pick among points of at most this compression.
        max_degradation: Of a sweep, pick the smallest point whose measured loss rises by at most this; if None, the one
            of least loss.
        sensitivity: CSV file of an earlier run, whose measurements are taken instead of measuring.
        table: CSV file that gets every measurement as it is made; a killed run that is repeated goes on from it.
        state_folder: Where such a file is kept while there is no result yet, in place of ``table``; ``quantize`` and
            the ``CalibTIP`` callback remove it at the end.
        output_folder: Gets the tables and pictures of the outcome as CSV and PNG; None for none.
        start_over: Whether the layers go back to float weights and ranges alone at the widths chosen, for a
            reconstruction that follows; otherwise they keep the states that reconstruction found at these widths.
        solver: ``"cbc"``, or ``"highs"`` where highspy is installed.
        time_limit: Seconds for one solution of the program.
        gap: Relative distance from the optimum at which the solver may stop.
        activation_budget: Bytes of activations that may lie in memory while measuring; the rest goes to files.
        scratch_folder: Where these files lie; the system's temporary folder if None.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        compression: float | Sequence[float] | None = None,
        candidates: Sequence[int | Sequence[int]] = (4, 8),
        weight_bytes: int | str | None = None,
        bit_operations: float | None = None,
        activation_bytes: int | str | None = None,
        latency: float | None = None,
        latency_table: Mapping[str, Mapping[Any, float]] | str | Path | None = None,
        max_loss: float | None = None,
        minimise: str = "loss",
        groups: Sequence[Sequence[str]] = (),
        agree_on_input: bool = False,
        agree_on_add: bool = False,
        metric: str | LossFunction = "kl",
        samples: int | None = None,
        checks: int = 16,
        pick_under: float | None = None,
        max_degradation: float | None = None,
        sensitivity: str | Path | None = None,
        table: str | Path | None = None,
        state_folder: str | Path | None = None,
        output_folder: str | Path | None = None,
        start_over: bool = False,
        solver: str = "cbc",
        time_limit: float | None = None,
        gap: float = 0.0,
        activation_budget: int | str | None = None,
        scratch_folder: str | Path | None = None,
    ) -> None:
        super().__init__()
        budgets = {
            "weight_bytes": parse_bytes(weight_bytes, "weight_bytes"),
            "bit_operations": bit_operations,
            "activation_bytes": parse_bytes(activation_bytes, "activation_bytes"),
            "latency": latency,
            "loss": max_loss,
        }
        limits = {name: _number(limit, name) for name, limit in budgets.items() if limit is not None}
        values = []
        if compression is not None and (isinstance(compression, str) or not isinstance(compression, Iterable)):
            limits["compression"] = _number(compression, "compression")
        elif compression is not None:
            values = [_number(value, "compression") for value in compression]
            if not values:
                raise ValueError("compression must be a number or a list with at least one, got an empty list.")
            limits["compression"] = max(values)
        elif not limits:
            limits["compression"] = DEFAULT_COMPRESSION
        self.sweep = Sweep(values, pick_under, max_degradation)
        self.candidates = list(dict.fromkeys(check_pair(pair, "candidates") for pair in candidates))
        if len(self.candidates) < 2:
            raise ValueError(f"candidates must be at least two different widths, got {candidates!r}.")
        if isinstance(latency_table, str | Path):
            latency_table = read_latencies(latency_table)
        options = Solver(solver, time_limit, gap)
        self.goal = Goal(limits, minimise, latency_table, groups, agree_on_input, agree_on_add, options)
        if checks < 0:
            raise ValueError(f"checks must be at least 0, got {checks}.")
        self.checks, self.start_over = checks, start_over
        self.state = None if state_folder is None or table is not None else Path(state_folder) / "sensitivity.csv"
        path, again = (None if file is None else Path(file) for file in (table or self.state, sensitivity))
        self.measurement = Measurement(metric, samples, path, again)
        self.output_folder = None if output_folder is None else Path(output_folder)
        self.activation_budget = parse_bytes(activation_budget, "activation_budget")
        self.scratch_folder = scratch_folder
        self.evaluate: Evaluate | None = None
        self.allocation: Allocation | None = None

    @override
    def clean_up(self) -> None:
        """Remove what was kept in the state folder, and the folder if nothing else is in it."""
        if self.state is not None:
            self.state.unlink(missing_ok=True)
            with suppress(OSError):
                self.state.parent.rmdir()

    @override
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Measure, solve, check and apply."""
        with ActivationStore(self.activation_budget, folder=self.scratch_folder) as store:
            self.allocation = allocate(
                module.network,
                module.calibration,
                self.candidates,
                self.goal,
                self.measurement,
                self.sweep,
                self.checks,
                store,
                self.evaluate,
                self.steps,
            )
        if self.start_over:
            module.network.start_over()
        self.exhibits = allocation_exhibits(self.allocation)
        if self.output_folder is not None:
            for exhibit in self.exhibits:
                exhibit.save(self.output_folder)
        chosen = self.allocation.chosen
        losses = {"predicted_loss": chosen.predicted_loss, "measured_loss": chosen.measured_loss}
        return {**losses, **chosen.costs}


def _number(value: Any, name: str) -> float:
    """A limit as a float; YAML reads ``2e9`` as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}.") from None
