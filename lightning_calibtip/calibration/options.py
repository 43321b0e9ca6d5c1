"""Options of the storage of captured activations."""

from dataclasses import dataclass
from pathlib import Path

from .activation_store import ActivationStore, parse_bytes, parse_precision


@dataclass(frozen=True)
class StorageOptions:
    """Where and in which precision captured activations are kept.

    Args:
        activation_budget: Bytes of captured activations that may be held in memory, a number or a string such as
            ``"2GB"``; what exceeds it goes to files. None for no limit.
        precision: ``"float32"``, or ``"bfloat16"`` to keep activations in half of the space.
        scratch_folder: Folder in which a temporary folder for these files is made; the system's temporary folder if
            None.

    Raises:
        ValueError: If the budget cannot be read or the precision is unknown.

    Example:
        >>> with StorageOptions(activation_budget="1MB").open() as store:
        ...     store.budget
        1000000
    """

    activation_budget: int | str | None = None
    precision: str = "float32"
    scratch_folder: Path | None = None

    def __post_init__(self) -> None:
        parse_bytes(self.activation_budget, "activation_budget")
        parse_precision(self.precision, "precision")
        if self.scratch_folder is not None:
            object.__setattr__(self, "scratch_folder", Path(self.scratch_folder))

    def open(self) -> ActivationStore:
        """A new, empty store, to be used as a context manager."""
        budget = parse_bytes(self.activation_budget, "activation_budget")
        return ActivationStore(budget, parse_precision(self.precision, "precision"), self.scratch_folder)
