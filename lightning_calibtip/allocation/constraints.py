"""Constraints of a bit allocation: what is minimised, what is limited, and which layers must agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .costs import cost_names
from .integer_program import Solver
from .latency import LatencyTable


@dataclass(frozen=True)
class Constraints:
    """What an allocation minimises, and what it must keep to.

    Args:
        limits: Greatest value of each limited cost by its registered name (see ``cost_names``), and of ``"loss"`` (its
            rise over the base); at least one.
        minimise: ``"loss"`` or the name of a cost, which then needs a limit on the loss.
        latency_table: See ``latencies``; needed for ``"latency"``.
        groups: Lists of names or patterns of layers that must have the same bit-widths.
        agree_on_input: Whether layers that read the same tensor must.
        agree_on_add: Whether layers whose outputs are added up must.
        solver: See ``Solver``.

    Raises:
        ValueError: If a name is unknown, a limit is not positive, or something needed is missing.

    Example:
        >>> Constraints({"compression": 0.13}).minimise
        'loss'
    """

    limits: Mapping[str, float]
    minimise: str = "loss"
    latency_table: LatencyTable | None = None
    groups: Sequence[Sequence[str]] = ()
    agree_on_input: bool = False
    agree_on_add: bool = False
    solver: Solver = field(default_factory=Solver)

    def __post_init__(self) -> None:
        costs = cost_names()
        for name, limit in self.limits.items():
            if name not in (*costs, "loss"):
                raise ValueError(f"A budget must be one of {', '.join((*costs, 'loss'))}, got {name!r}.")
            if not limit > 0:
                raise ValueError(f"{name} must be above 0, got {limit}.")
        if self.limits.get("compression", 0.0) > 1:
            raise ValueError(f"compression must be at most 1, got {self.limits['compression']}.")
        if self.minimise not in (*costs, "loss"):
            raise ValueError(f"minimise must be one of {', '.join(('loss', *costs))}, got {self.minimise!r}.")
        if self.minimise == "loss" and ("loss" in self.limits or not self.limits):
            raise ValueError(
                f"minimise='loss' needs a budget of {', '.join(costs[:-1])} or {costs[-1]}, and none of the loss: "
                "max_loss goes with another minimise."
            )
        if self.minimise != "loss" and "loss" not in self.limits:
            raise ValueError(f"minimise={self.minimise!r} needs max_loss, or every layer would take the fewest bits.")
        if "latency" in (*self.limits, self.minimise) and self.latency_table is None:
            raise ValueError("latency needs a latency_table: layer -> bit-widths -> latency.")
