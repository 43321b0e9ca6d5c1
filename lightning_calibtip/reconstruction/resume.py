"""Finished units on disk, from which a run that was killed is resumed."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..calibration.calibration_set import CalibrationSet
from ..calibration.fingerprint import digest_data, digest_states
from ..files.atomic import write_atomically
from ..files.damage import describe_error
from ..files.digest import digest
from ..network.layers import QuantizedLayer
from ..network.states import LayerState
from .optimize import UnitResult
from .units import Unit

# Version of the files, in run.json; folders of earlier releases have none.
FORMAT_VERSION = 2

_VERSION_KEY = "format version"

# Names of the files, with wildcards.
FILES = ("run.json", "[0-9][0-9][0-9][0-9].pt", "[0-9][0-9][0-9][0-9]-*.pt")


class FinishedUnits:
    """Finished units of one reconstruction, each in a file that is written completely or not at all.

    Args:
        folder: Folder of this reconstruction alone; made if it does not exist.
        run: What the reconstruction depends on, by name; where a folder was begun with other values, it is refused.

    Raises:
        ValueError: If the folder belongs to another run, or was written by a release with another format.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = FinishedUnits(folder, {"seed": "0"})
        ...     FinishedUnits(folder, {"seed": "1"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ... holds the state of a reconstruction with another seed, which was killed, or has not been ...
    """

    def __init__(self, folder: str | Path, run: dict[str, str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        description = self.folder / "run.json"
        if not description.exists():
            write_atomically(description, json.dumps({_VERSION_KEY: FORMAT_VERSION, **run}, indent=2).encode())
        try:
            begun = dict(json.loads(description.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{description} is damaged ({error}): remove {self.folder} to begin anew, or take another copy of it."
            ) from error
        if begun.get(_VERSION_KEY) != FORMAT_VERSION:
            self._refuse_format(begun.get(_VERSION_KEY, 1))
        if other := [name for name in run if begun.get(name) != run[name]]:
            raise ValueError(
                f"{self.folder} holds the state of a reconstruction with another {', '.join(other)}, which was killed, "
                "or has not been saved: repeat that run to finish it, or remove the folder to begin anew."
            )

    def load(self, position: int, unit: Unit, label: str = "") -> UnitResult | None:
        """Put a finished unit's layers into their final state and return its result; None if it is not finished.

        Args:
            position: Index of the unit.
            unit: The unit.
            label: Name of the candidate, where a unit is reconstructed for several.
        """
        path = self._path(position, label)
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved["digest"] != _digest_of(saved["states"], saved["result"]):
                raise ValueError("its digest does not fit")
            states = [LayerState.from_dict(state) for state in saved["states"]]
            result = UnitResult(**{**saved["result"], "layers": tuple(saved["result"]["layers"])})
        except PermissionError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path} is damaged ({describe_error(error)}): remove it, and this unit is reconstructed again."
            ) from error
        for layer, of_layer in zip(unit.layers, states, strict=True):
            layer.restore(of_layer)
        return result

    def save(self, position: int, unit: Unit, result: UnitResult, label: str = "") -> None:
        """Keep a finished unit.

        Args:
            position: Index of the unit.
            unit: The unit, in its final state.
            result: Outcome of its reconstruction.
            label: See ``load``.
        """
        states = [layer.save().to_dict() for layer in unit.layers]
        described = asdict(result)
        saved = {"states": states, "result": described, "digest": _digest_of(states, described)}
        write_atomically(self._path(position, label), lambda file: torch.save(saved, file))

    def _path(self, position: int, label: str) -> Path:
        return self.folder / (f"{position:04d}-{label}.pt" if label else f"{position:04d}.pt")

    def _refuse_format(self, version: int = 1) -> None:
        what = "an earlier release" if version < FORMAT_VERSION else f"a later release (format version {version})"
        raise ValueError(
            f"{self.folder} was written by {what}: finish it with that release, or remove the folder to begin anew."
        )


def _digest_of(states: Sequence[dict[str, Any]], result: dict[str, Any]) -> str:
    return digest([{**result, "layers": tuple(result["layers"])}, *states])


def describe_run(
    units: Sequence[Unit], layers: Sequence[QuantizedLayer], calibration: CalibrationSet, settings: dict[str, Any]
) -> dict[str, str]:
    """Short description of everything that the result of a reconstruction depends on. See ``FinishedUnits``.

    Args:
        units: Units to reconstruct.
        layers: All layers of the network, in their states before it.
        calibration: Calibration set.
        settings: Other values, by name.
    """
    return {
        **{name: repr(value) for name, value in settings.items()},
        "units": digest([unit.name for unit in units]),
        "calibrated state": digest_states(layer.save() for layer in layers),
        "calibration data": digest_data(calibration),
    }
