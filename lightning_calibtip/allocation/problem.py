"""The allocation problem of one model: its tables, which can be solved for any limits."""

from collections.abc import Mapping, Sequence

from ..calibration.calibration_set import CalibrationSet
from ..network.network import QuantizedNetwork
from ..quantization.spec import BitWidths
from .constraints import Constraints
from .costs import CostInputs, CostTable, cost_names, cost_table, open_candidates
from .groups import feeding_an_add, named_groups, sharing_a_weight, sharing_an_input
from .integer_program import Budget, Choice, choose_candidates, merge_groups
from .table import SensitivityTable

# Under which name the user knows a limit.
_NAMES = {"loss": "max_loss"}

# Both come from the same pass over a batch.
_FROM_WORK = {"bit_operations", "activation_bytes"}


class Problem:
    """The tables of one model; once it has losses, it can be solved for any limits.

    Args:
        network: Calibrated network.
        calibration: Calibration set; one batch is run to count operations, if a cost asks for them.
        candidates: Candidate bit-widths of the searchable layers.
        constraints: See ``Constraints``.

    Raises:
        ValueError: If the constraints name unknown layers, or layers that must agree cannot.

    Example:
        See ``allocate``, which states and solves it.
    """

    def __init__(
        self,
        network: QuantizedNetwork,
        calibration: CalibrationSet,
        candidates: Sequence[BitWidths],
        constraints: Constraints,
    ) -> None:
        self.constraints, self.searchable, self.candidates = constraints, network.searchable_layers, list(candidates)
        self.options = open_candidates(network, candidates)
        needed = {"compression", constraints.minimise, *constraints.limits}
        if needed & _FROM_WORK:
            needed |= _FROM_WORK
        if constraints.latency_table is not None:
            needed.add("latency")
        inputs = CostInputs(network, calibration, self.options, constraints.latency_table)
        self.costs: dict[str, CostTable] = {name: cost_table(name, inputs) for name in cost_names() if name in needed}
        groups = named_groups(network, constraints.groups)
        observed = sharing_a_weight(network)
        observed += sharing_an_input(network) if constraints.agree_on_input else []
        observed += feeding_an_add(network) if constraints.agree_on_add else []
        # Layers whose bit-widths are pinned do not bind those that they happen to meet.
        searchable = [[name for name in group if name in self.searchable] for group in observed]
        self.groups = merge_groups(self.options, [*groups, *filter(None, searchable)])
        self.losses: CostTable = {name: dict.fromkeys(of_layer, 0.0) for name, of_layer in self.options.items()}

    def set_losses(self, table: SensitivityTable) -> None:
        """Take the losses of the searchable layers from a table of measurements."""
        for name in self.searchable:
            self.losses[name] = {bits: table.rise(name, bits) for bits in self.options[name]}

    def solve(self, limits: Mapping[str, float] | None = None, minimise: str | None = None) -> Choice[BitWidths]:
        """Find the best choice for the constraints, with other limits or another objective if given.

        Raises:
            InfeasibleBudgetError: If there is none.
        """
        chosen = self.constraints.limits if limits is None else limits
        budgets = [Budget(_NAMES.get(name, name), self._table(name), limit) for name, limit in chosen.items()]
        objective = self._table(minimise or self.constraints.minimise)
        return choose_candidates(objective, budgets, self.groups, self.constraints.solver)

    def _table(self, name: str) -> CostTable:
        return self.losses if name == "loss" else self.costs[name]

    def total(self, name: str, bits: Mapping[str, BitWidths]) -> float:
        """Sum of a cost, or of the predicted ``"loss"``, over a choice for all layers."""
        return sum(of_layer[bits[layer]] for layer, of_layer in self._table(name).items())

    def fits(self, bits: Mapping[str, BitWidths], limits: Mapping[str, float]) -> bool:
        """Whether a choice keeps these limits (but for that of the loss) and the groups."""
        return all(len({bits[layer] for layer in group}) == 1 for group in self.groups) and all(
            self.total(name, bits) <= limit * (1 + 1e-9) for name, limit in limits.items() if name != "loss"
        )

    def uniform(self, candidate: BitWidths) -> dict[str, BitWidths]:
        """The choice that gives all searchable layers the same bit-widths."""
        return {name: candidate if name in self.searchable else of_layer[0] for name, of_layer in self.options.items()}
