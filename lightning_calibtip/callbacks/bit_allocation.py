"""BitAllocation: give each layer its own bit-widths under a budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from ..allocation.allocate import allocate, state_problem
from ..allocation.options import AllocationOptions
from ..allocation.outcome import Allocation
from ..calibration.divergences import divergence_of
from ..calibration.options import StorageOptions
from ..files.state_folder import holding, remove_state
from ..module import QuantizationModule
from ..network.scheme import QuantizationScheme
from ..report.allocation import allocation_items
from .options import merge_fields, storage_options
from .outcome import allocation_outcome
from .stage import Stage, StageResult

# Name of the table of measurements in a state folder.
_TABLE = "sensitivity.csv"


class BitAllocation(Stage):
    """Measures the loss of each layer at each candidate and solves an integer program for the best mix.

    ``allocation`` holds the last outcome. Where ``evaluate`` is set, each point of a sweep is evaluated by it.

    Args:
        options: Budgets, candidates and solver; the defaults of ``AllocationOptions`` if None.
        storage: Where activations are kept while measuring: ``StorageOptions``, or a mapping of its fields
            (``{"activation_budget": "2GB"}``).
        state_folder: Folder for the table of measurements while there is no result yet, in place of ``table``: a run
            that was killed and is repeated is resumed from there. ``quantize`` and the ``CalibTIP`` callback remove it
            at the end.
        **changes: Fields of ``AllocationOptions`` that differ: ``compression``, ``candidates``, ``metric``, ...

    Raises:
        TypeError: If an option does not exist.
        ValueError: If a value is out of its range.

    Example:
        >>> BitAllocation(compression=0.2, candidates=[2, 4, 8]).options.compression
        0.2
    """

    compares_logits = True

    def __init__(
        self,
        options: AllocationOptions | None = None,
        *,
        storage: StorageOptions | Mapping[str, Any] | None = None,
        state_folder: str | Path | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        changes = merge_fields(self.name, AllocationOptions, options, changes)
        self.options = AllocationOptions(**changes)
        metric = self.options.metric
        self.divergence = None if callable(metric) else divergence_of(metric)
        self.storage = storage_options(self.name, storage)
        keeps = state_folder is not None and self.options.table is None
        self.state_folder = Path(state_folder) if keeps and state_folder is not None else None
        self.allocation: Allocation | None = None

    @override
    def check(self, scheme: QuantizationScheme) -> None:
        """Refuse candidates that the scheme's target cannot run, and a compression below the narrowest of them.

        Raises:
            InfeasibleBudgetError: If the compression is out of reach whatever the model.
            ValueError: If there is such a candidate, or fewer than two are different under the scheme.
        """
        self.options.check_reachable(scheme)
        for candidate in self.options.bit_widths(scheme):
            if scheme.engine is not None:
                scheme.engine.check_bits(candidate.weight, candidate.activation, f"candidates: {candidate.label}")

    @override
    def check_plan(self, module: QuantizationModule) -> None:
        """See ``Stage``.

        Raises:
            InfeasibleBudgetError: If no choice keeps the budgets of costs.
            ValueError: If no layer is free to be chosen for, or the constraints do not fit the model.
            TypeError: If the model's output has no logits.
        """
        super().check_plan(module)
        state_problem(module.network, module.calibration, self.options)

    @override
    def clean_up(self) -> None:
        """Remove what was kept in the state folder, and the folder if nothing else is in it."""
        remove_state(self.state_folder, [_TABLE])

    @override
    def run(self, module: QuantizationModule) -> StageResult:
        """Measure, solve, check and apply."""
        options, network = self.options, module.network
        table = None if options.table is None else Path(options.table)
        if self.state_folder is not None:
            table = self.state_folder / _TABLE
        with holding(self.state_folder), self.storage.open() as store:
            self.allocation = allocate(network, module.calibration, options, store, self.evaluate, self.progress, table)
        if options.reset_to_float:
            network.reset_to_float()
        items = allocation_items(self.allocation)
        if options.output_folder is not None:
            for item in items:
                item.save(Path(options.output_folder))
        chosen = self.allocation.chosen
        losses = {"predicted_loss": chosen.predicted_loss, "measured_loss": chosen.measured_loss}
        return StageResult({**losses, **chosen.costs}, items, allocation_outcome(chosen))
