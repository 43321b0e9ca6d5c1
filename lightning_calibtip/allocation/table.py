"""The table of sensitivities, and its file: a line for every measurement, written as it is made."""

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from ..quantization.scheme import Bits

_VERSION = 1
_COLUMNS = ["layer", "weight_bits", "activation_bits", "loss", "rise"]


@dataclass(frozen=True)
class Conditions:
    """What the measurements of a table depend on.

    Args:
        model: Digest of the float model.
        states: Digest of the layers' states and of the samples.
        metric: Name of the loss.
        samples: Number of samples it was measured on.
        base: Width ``(weight_bits, activation_bits)`` of all other layers.
    """

    model: str
    states: str
    metric: str
    samples: int
    base: Bits


@dataclass(frozen=True)
class SensitivityTable:
    """Loss of the model when a single layer takes a candidate width and the rest stay at the base.

    Args:
        conditions: See ``Conditions``.
        base_loss: Loss with all layers at the base.
        losses: Layer -> candidate -> loss.
    """

    conditions: Conditions
    base_loss: float
    losses: dict[str, dict[Bits, float]] = field(default_factory=dict)

    def rise(self, layer: str, bits: Bits) -> float:
        """How far the loss lies above that of the base."""
        return 0.0 if bits == self.conditions.base else self.losses[layer][bits] - self.base_loss

    def write(self, path: str | Path) -> None:
        """Write all of it, as ``SensitivityFile`` does line by line."""
        Path(path).unlink(missing_ok=True)
        with SensitivityFile(path, self.conditions) as file:
            file.add_base(self.base_loss)
            for layer, of_layer in self.losses.items():
                for bits, loss in of_layer.items():
                    file.add(layer, bits, loss)


def read_table(path: str | Path) -> SensitivityTable:
    """Read a table back.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such table, has no base, or holds a value that is not finite; the message names file and
            line.
    """
    path = Path(path)
    with path.open(newline="") as file:
        conditions = _read_conditions(path, file.readline())
        table = _read_lines(path, file, conditions)
    if table is None:
        raise ValueError(f"{path}: the table has no measurement of the base; measure it anew.")
    return table


def _read_conditions(path: Path, line: str) -> Conditions:
    try:
        values = json.loads(line.removeprefix("#"))
        version = values.pop("version")
        conditions = Conditions(**{**values, "base": tuple(values["base"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no sensitivity table: its first line must be '#' and the conditions as JSON, got {line[:80]!r}."
        ) from error
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}, this is version {_VERSION}; measure it anew.")
    return conditions


def _read_lines(path: Path, file: TextIO, conditions: Conditions) -> SensitivityTable | None:
    """The table, or None if there is not even the base; a last line that was cut off is left out."""
    lines = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
    table = None
    for number, row in enumerate(csv.reader(lines), start=2):
        if row == _COLUMNS:
            continue
        try:
            layer, weight_bits, activation_bits, loss = row[0], int(row[1]), int(row[2]), float(row[3])
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{path}, line {number}: expected {', '.join(_COLUMNS)}, got {','.join(row)!r}."
            ) from error
        check_finite(loss, layer, (weight_bits, activation_bits), f"{path}, line {number}: ")
        if not layer:
            table = SensitivityTable(conditions, loss)
        elif table is None:
            raise ValueError(f"{path}, line {number}: the base (a line without a layer) must come first.")
        else:
            table.losses.setdefault(layer, {})[weight_bits, activation_bits] = loss
    return table


def check_finite(loss: float, layer: str, bits: Bits, where: str = "") -> None:
    """Raise ``ValueError`` if a measured loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise ValueError(
            f"{where}the loss with {layer or 'all layers'} at {bits[0]} bits of weight and {bits[1]} of activation is "
            f"{loss}. Look at the model's outputs there, leave that candidate out, or fix the layer by an override."
        )


class SensitivityFile:
    """A table on disk that grows by a line a measurement; one that a killed run has left is gone on with.

    Args:
        path: Of the CSV file.
        conditions: Of the run.

    Raises:
        ValueError: If the file holds another run's table, or none at all.
    """

    def __init__(self, path: str | Path, conditions: Conditions) -> None:
        self.path, self.conditions = Path(path), conditions
        self.table: SensitivityTable | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and b"\n" in (content := self.path.read_bytes()):
            self._take_up(content)
            self._file = self.path.open("a", newline="")
        else:
            self._file = self.path.open("w", newline="")
            self._file.write(f"# {json.dumps({'version': _VERSION, **asdict(conditions)})}\n")
            self._write(_COLUMNS)

    def __enter__(self) -> "SensitivityFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add_base(self, loss: float) -> SensitivityTable:
        """Write the loss of the base, which comes first; the table begins with it."""
        check_finite(loss, "", self.conditions.base)
        self.table = SensitivityTable(self.conditions, loss)
        self._write(["", *self.conditions.base, repr(loss), repr(0.0)])
        return self.table

    def add(self, layer: str, bits: Bits, loss: float) -> None:
        """Write a measurement.

        Raises:
            ValueError: If it is not finite; nothing is written then.
        """
        assert self.table is not None, "the base comes first"
        check_finite(loss, layer, bits)
        self.table.losses.setdefault(layer, {})[bits] = loss
        self._write([layer, *bits, repr(loss), repr(loss - self.table.base_loss)])

    def _take_up(self, content: bytes) -> None:
        """Read what is there, without a last line that was cut off."""
        with self.path.open(newline="") as file:
            begun = _read_conditions(self.path, file.readline())
            if different := [name for name, value in asdict(self.conditions).items() if getattr(begun, name) != value]:
                raise ValueError(
                    f"{self.path} was begun with another {', '.join(different)}: repeat that run to finish it, or "
                    "remove the file to measure anew."
                )
            self.table = _read_lines(self.path, file, begun)
        os.truncate(self.path, content.rindex(b"\n") + 1)

    def _write(self, row: Sequence[object]) -> None:
        csv.writer(self._file, lineterminator="\n").writerow(row)
        self._file.flush()
        os.fsync(self._file.fileno())
