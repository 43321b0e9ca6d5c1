"""The allocation problem of one model: its tables, what is minimised, and what is limited."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..calibration.calibration_set import CalibrationSet
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits
from .costs import (
    CostTable,
    LatencyTable,
    activation_bytes,
    bit_operations,
    latencies,
    measure_work,
    open_candidates,
    weight_bytes,
    weight_ratios,
)
from .groups import feeding_an_add, named_groups, sharing_a_weight, sharing_an_input
from .integer_program import Budget, Choice, Solver, choose_candidates, merge_groups
from .table import SensitivityTable

# Under which name the user knows a limit.
_NAMES = {"loss": "max_loss"}

COSTS = ("compression", "weight_bytes", "bit_operations", "activation_bytes", "latency")


@dataclass(frozen=True)
class Goal:
    """What is wanted of an allocation.

    Args:
        limits: Greatest value of ``"compression"`` (bits of the weights over 32 bits each), ``"weight_bytes"``,
            ``"bit_operations"`` a sample, ``"activation_bytes"`` a sample, ``"latency"``, or ``"loss"`` (rise over the
            base); at least one.
        minimise: ``"loss"`` or one of the costs, which then needs a limit on the loss.
        latency_table: See ``latencies``; needed for ``"latency"``.
        groups: Lists of names or patterns of layers that must take the same width.
        agree_on_input: Whether layers that read the same tensor must.
        agree_on_add: Whether layers whose outputs are added up must.
        solver: See ``Solver``.

    Raises:
        ValueError: If a name is unknown, a limit is not positive, or something needed is missing.
    """

    limits: Mapping[str, float]
    minimise: str = "loss"
    latency_table: LatencyTable | None = None
    groups: Sequence[Sequence[str]] = ()
    agree_on_input: bool = False
    agree_on_add: bool = False
    solver: Solver = field(default_factory=Solver)

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            if name not in (*COSTS, "loss"):
                raise ValueError(f"A budget must be one of {', '.join((*COSTS, 'loss'))}, got {name!r}.")
            if not limit > 0:
                raise ValueError(f"{name} must be above 0, got {limit}.")
        if self.limits.get("compression", 0.0) > 1:
            raise ValueError(f"compression must be at most 1, got {self.limits['compression']}.")
        if self.minimise not in (*COSTS, "loss"):
            raise ValueError(f"minimise must be one of {', '.join(('loss', *COSTS))}, got {self.minimise!r}.")
        if self.minimise == "loss" and ("loss" in self.limits or not self.limits):
            raise ValueError(
                "minimise='loss' needs a budget of compression, weight_bytes, bit_operations, activation_bytes or "
                "latency, and none of the loss: max_loss goes with another minimise."
            )
        if self.minimise != "loss" and "loss" not in self.limits:
            raise ValueError(f"minimise={self.minimise!r} needs max_loss, or every layer would take the fewest bits.")
        if "latency" in (*self.limits, self.minimise) and self.latency_table is None:
            raise ValueError("latency needs a latency_table: layer -> width -> latency.")


class Problem:
    """The tables of one model; once it has losses, it can be solved for any limits.

    Args:
        network: Calibrated.
        calibration: One batch is run to count operations, if the goal asks for them.
        candidates: ``(weight_bits, activation_bits)`` pairs for the free layers.
        goal: See ``Goal``.

    Raises:
        ValueError: If the goal names unknown layers, or layers that must agree cannot.
    """

    def __init__(
        self, network: QuantizedNetwork, calibration: CalibrationSet, candidates: Sequence[Bits], goal: Goal
    ) -> None:
        self.goal, self.free, self.candidates = goal, network.free_layers, list(candidates)
        self.options = open_candidates(network, candidates)
        needed = {"compression", goal.minimise, *goal.limits}
        self.costs: dict[str, CostTable] = {"compression": weight_ratios(network, self.options)}
        if "weight_bytes" in needed:
            self.costs["weight_bytes"] = weight_bytes(network, self.options)
        if needed & {"bit_operations", "activation_bytes"}:
            work = measure_work(network, calibration)
            products = [name for name, layer in network.layers.items() if layer.kind.channel_axis is None]
            self.costs["bit_operations"] = bit_operations(work, self.options, products)
            self.costs["activation_bytes"] = activation_bytes(work, self.options)
        if goal.latency_table is not None:
            self.costs["latency"] = latencies(goal.latency_table, self.options)
        groups = named_groups(network, goal.groups)
        observed = sharing_a_weight(network)
        observed += sharing_an_input(network) if goal.agree_on_input else []
        observed += feeding_an_add(network) if goal.agree_on_add else []
        # Layers whose width is fixed do not bind those that they happen to meet.
        free = [[name for name in group if name in self.free] for group in observed]
        self.groups = merge_groups(self.options, [*groups, *filter(None, free)])
        self.losses: CostTable = {name: dict.fromkeys(of_layer, 0.0) for name, of_layer in self.options.items()}

    def set_losses(self, table: SensitivityTable) -> None:
        """Take the losses of the free layers from a table of measurements."""
        for name in self.free:
            self.losses[name] = {bits: table.rise(name, bits) for bits in self.options[name]}

    def solve(self, limits: Mapping[str, float] | None = None, minimise: str | None = None) -> Choice[Bits]:
        """The best choice for the goal, with other limits or another objective if given.

        Raises:
            InfeasibleBudgetError: If there is none.
        """
        chosen = self.goal.limits if limits is None else limits
        budgets = [Budget(_NAMES.get(name, name), self._table(name), limit) for name, limit in chosen.items()]
        objective = self._table(minimise or self.goal.minimise)
        return choose_candidates(objective, budgets, self.groups, self.goal.solver)

    def _table(self, name: str) -> CostTable:
        return self.losses if name == "loss" else self.costs[name]

    def total(self, name: str, bits: Mapping[str, Bits]) -> float:
        """Sum of a cost, or of the predicted ``"loss"``, over a choice for all layers."""
        return sum(of_layer[bits[layer]] for layer, of_layer in self._table(name).items())

    def fits(self, bits: Mapping[str, Bits], limits: Mapping[str, float]) -> bool:
        """Whether a choice keeps these limits (but for that of the loss) and the groups."""
        return all(len({bits[layer] for layer in group}) == 1 for group in self.groups) and all(
            self.total(name, bits) <= limit * (1 + 1e-9) for name, limit in limits.items() if name != "loss"
        )

    def uniform(self, candidate: Bits) -> dict[str, Bits]:
        """The choice that gives all free layers the same width."""
        return {name: candidate if name in self.free else of_layer[0] for name, of_layer in self.options.items()}
