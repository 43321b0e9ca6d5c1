"""What became of each finished unit, on disk: a run that was killed goes on from there."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ..calibration.calibration_set import CalibrationSet
from ..calibration.fingerprint import digest, digest_data, digest_states
from ..calibration.whole_file import write_whole
from ..quantization.layers import LayerState, QuantizedLayer
from .optimize import UnitResult
from .units import Unit


class Progress:
    """Finished units of one reconstruction: a file each, written whole or not at all.

    Args:
        folder: Of this reconstruction alone; made if it is not there.
        run: What the reconstruction depends on, by name; where a folder was begun with other values, it is refused.

    Raises:
        ValueError: If the folder belongs to another run.
    """

    def __init__(self, folder: str | Path, run: dict[str, str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        description = self.folder / "run.json"
        if not description.exists():
            write_whole(description, json.dumps(run, indent=2).encode())
        begun = json.loads(description.read_text())
        if other := [name for name in run if begun.get(name) != run[name]]:
            raise ValueError(
                f"{self.folder} holds an unfinished reconstruction with another {', '.join(other)}: repeat that run "
                "to finish it, or remove the folder to begin anew."
            )

    def load(self, position: int, unit: Unit) -> UnitResult | None:
        """Put a finished unit's layers into their final state and return its result; None if it is not finished."""
        path = self._path(position)
        if not path.exists():
            return None
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for layer, state in zip(unit.layers, saved["states"], strict=True):
            layer.restore(LayerState(**{**state, "bits": tuple(state["bits"])}))
        return UnitResult(**{**saved["result"], "layers": tuple(saved["result"]["layers"])})

    def save(self, position: int, unit: Unit, result: UnitResult) -> None:
        """Keep a finished unit."""
        states = [
            {field.name: getattr(state, field.name) for field in fields(LayerState)}
            for state in (layer.save() for layer in unit.layers)
        ]
        content = io.BytesIO()
        torch.save({"states": states, "result": asdict(result)}, content)
        write_whole(self._path(position), content.getvalue())

    def _path(self, position: int) -> Path:
        return self.folder / f"{position:04d}.pt"


def describe_run(
    units: Sequence[Unit], layers: Sequence[QuantizedLayer], calibration: CalibrationSet, settings: dict[str, Any]
) -> dict[str, str]:
    """What the result of a reconstruction depends on, in short."""
    return {
        **{name: repr(value) for name, value in settings.items()},
        "units": digest([unit.name for unit in units]),
        "calibrated state": digest_states(layer.save() for layer in layers),
        "calibration data": digest_data(calibration),
    }
