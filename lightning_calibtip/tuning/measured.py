"""Losses that a search has measured, kept in a file, from which a search that was killed is replayed."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..files.atomic import write_atomically

FILE_NAME = "joint_search.json"


class MeasuredLosses:
    """The losses of a search that always asks for the same ones in the same order.

    Args:
        path: The file; None to keep none.
        run: Digest of what the losses depend on.

    Raises:
        ValueError: If the file is of another search, or is not such a file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / FILE_NAME
        ...     first = MeasuredLosses(path, "a").next(lambda: torch.tensor([0.5, 1.5]))
        ...     float(MeasuredLosses(path, "a").next(lambda: 1 / 0))
        1.0
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self._path, self._run = path, run
        self._losses: list[float] = []
        self._asked = 0
        if path is not None and path.exists():
            try:
                found = json.loads(path.read_text())
                begun, losses = str(found["run"]), [float(loss) for loss in found["losses"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not the state of a joint search ({error}): remove it.") from error
            if begun != run:
                raise ValueError(
                    f"{path} holds an unfinished joint search of another model, other data or other options: repeat "
                    "that run to finish it, or remove the file to begin anew."
                )
            self._losses = losses

    def next(self, measure: Callable[[], Tensor]) -> Tensor:
        """The next loss, shape (1,): what the file holds, else the mean of what ``measure`` gives."""
        self._asked += 1
        if self._asked > len(self._losses):
            self._losses.append(float(measure().mean()))
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                content = json.dumps({"run": self._run, "losses": self._losses})
                write_atomically(self._path, content.encode())
        return torch.tensor([self._losses[self._asked - 1]])
