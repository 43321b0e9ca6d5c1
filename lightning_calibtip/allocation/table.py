"""The table of sensitivities, and its file: a line for every measurement, written as it is made."""

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from ..files.atomic import replacing
from ..files.cells import inert, original
from ..quantization.spec import BitWidths

# Version 1 had no bit-width None.
_VERSION = 2
_READABLE = (1, 2)
_COLUMNS = ["layer", "weight_bits", "activation_bits", "loss", "rise"]


@dataclass(frozen=True)
class Conditions:
    """What the measurements of a table depend on.

    Args:
        model: Digest of the float model.
        states: Digest of the layers' states and of the samples.
        metric: Name of the loss.
        samples: Number of samples that it was measured on.
        base: Bit-widths of all other layers.

    Example:
        See ``SensitivityTable``.
    """

    model: str
    states: str
    metric: str
    samples: int
    base: BitWidths


@dataclass(frozen=True)
class SensitivityTable:
    """Loss of the model when a single layer has a candidate's bit-widths and the others those of the base.

    Args:
        conditions: See ``Conditions``.
        base_loss: Loss with all layers at the base.
        losses: Layer -> candidate -> loss.

    Example:
        >>> conditions = Conditions("model", "states", "kl", 16, BitWidths(8, None))
        >>> table = SensitivityTable(conditions, 0.25, {"conv1": {BitWidths(4, None): 0.75}})
        >>> table.rise("conv1", BitWidths(4, None)), table.rise("conv1", BitWidths(8, None))
        (0.5, 0.0)
    """

    conditions: Conditions
    base_loss: float
    losses: dict[str, dict[BitWidths, float]] = field(default_factory=dict)

    def rise(self, layer: str, bits: BitWidths) -> float:
        """How far the loss is above that of the base."""
        return 0.0 if bits == self.conditions.base else self.losses[layer][bits] - self.base_loss

    def write(self, path: str | Path) -> None:
        """Write all of it, as ``SensitivityFile`` does line by line, but completely or not at all."""
        with replacing(path) as unfinished, SensitivityFile(unfinished, self.conditions) as file:
            file.add_base(self.base_loss)
            for layer, of_layer in self.losses.items():
                for bits, loss in of_layer.items():
                    file.add(layer, bits, loss)


def read_table(path: str | Path) -> SensitivityTable:
    """Read a table back.

    Args:
        path: CSV file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such table, has no base, or holds a value that is not finite; the message names file and
            line.

    Example:
        See ``SensitivityFile``.
    """
    path = Path(path)
    with path.open(newline="") as file:
        _, conditions = _read_conditions(path, file.readline())
        table = _read_lines(path, file, conditions)
    if table is None:
        raise ValueError(f"{path}: the table has no measurement of the base; measure it anew.")
    return table


def _read_conditions(path: Path, line: str) -> tuple[int, Conditions]:
    """Version and conditions from the first line."""
    try:
        values = json.loads(line.removeprefix("#"))
        version = values.pop("version")
        weight, activation = values["base"]
        conditions = Conditions(**{**values, "base": BitWidths(weight, activation)})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no sensitivity table: its first line must be '#' and the conditions as JSON, got {line[:80]!r}."
        ) from error
    if version not in _READABLE:
        raise ValueError(
            f"{path} has version {version}, this release reads versions 1 and {_VERSION}; measure it anew."
        )
    return version, conditions


def _read_lines(path: Path, file: TextIO, conditions: Conditions) -> SensitivityTable | None:
    """The table, or None if there is not even the base; a last line that was cut off is left out."""
    lines = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
    table = None
    for number, row in enumerate(csv.reader(lines), start=2):
        if row == _COLUMNS:
            continue
        try:
            layer, loss = original(row[0]), float(row[3])
            bits = BitWidths(int(row[1]) if row[1] else None, int(row[2]) if row[2] else None)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{path}, line {number}: expected {', '.join(_COLUMNS)}, got {','.join(row)!r}."
            ) from error
        check_finite(loss, layer, bits, f"{path}, line {number}: ")
        if not layer:
            if table is not None and table.base_loss != loss:
                raise ValueError(
                    f"{path}, line {number}: the loss of the base is {loss}, but an earlier line says "
                    f"{table.base_loss}: remove the wrong one, or measure anew."
                )
            table = table or SensitivityTable(conditions, loss)
        elif table is None:
            raise ValueError(f"{path}, line {number}: the base (a line without a layer) must come first.")
        elif table.losses.setdefault(layer, {}).setdefault(bits, loss) != loss:
            raise ValueError(
                f"{path}, line {number}: the loss of {layer} at {bits.label} is {loss}, but an earlier line says "
                f"{table.losses[layer][bits]}: remove the wrong one, or measure anew."
            )
    return table


def check_finite(loss: float, layer: str, bits: BitWidths, where: str = "") -> None:
    """Raise ``ValueError`` if a measured loss is NaN or infinite.

    Args:
        loss: The loss.
        layer: Layer that it was measured for; ``""`` for all of them.
        bits: Bit-widths that it was measured at.
        where: Text put before the message.

    Example:
        >>> check_finite(0.5, "conv1", BitWidths(4, 8))
    """
    if not math.isfinite(loss):
        weight = "float weights" if bits.weight is None else f"{bits.weight} bits of weight"
        activation = "float activations" if bits.activation is None else f"{bits.activation} of activation"
        raise ValueError(
            f"{where}the loss with {layer or 'all layers'} at {weight} and {activation} is {loss}. Look at the model's "
            "outputs there, leave that candidate out, or pin the layer's bit-widths by an override."
        )


class SensitivityFile:
    """A table on disk that grows by one line with each measurement; one that a killed run has left is resumed.

    Args:
        path: CSV file.
        conditions: Conditions of the run.

    Raises:
        ValueError: If the file holds another run's table, or none at all.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> conditions = Conditions("model", "states", "kl", 16, BitWidths(8, None))
        >>> with TemporaryDirectory() as folder:
        ...     with SensitivityFile(f"{folder}/table.csv", conditions) as file:
        ...         _ = file.add_base(0.25)
        ...         file.add("conv1", BitWidths(4, None), 0.75)
        ...     read_table(f"{folder}/table.csv").losses
        {'conv1': {BitWidths(weight=4, activation=None): 0.75}}
    """

    def __init__(self, path: str | Path, conditions: Conditions) -> None:
        self.path, self.conditions = Path(path), conditions
        self.table: SensitivityTable | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and b"\n" in (content := self.path.read_bytes()):
            self._resume(content)
            self._file = self.path.open("a", newline="")
        else:
            self._file = self.path.open("w", newline="")
            base = [conditions.base.weight, conditions.base.activation]
            self._file.write(f"# {json.dumps({'version': _VERSION, **asdict(conditions), 'base': base})}\n")
            self._write(_COLUMNS)

    def __enter__(self) -> "SensitivityFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add_base(self, loss: float) -> SensitivityTable:
        """Write the loss of the base, which comes first; the table begins with it."""
        check_finite(loss, "", self.conditions.base)
        self.table = SensitivityTable(self.conditions, loss)
        self._write(["", self.conditions.base.weight, self.conditions.base.activation, repr(loss), repr(0.0)])
        return self.table

    def add(self, layer: str, bits: BitWidths, loss: float) -> None:
        """Write a measurement.

        Raises:
            ValueError: If it is not finite; nothing is written then.
        """
        assert self.table is not None, "the base comes first"
        check_finite(loss, layer, bits)
        self.table.losses.setdefault(layer, {})[bits] = loss
        self._write([inert(layer), bits.weight, bits.activation, repr(loss), repr(loss - self.table.base_loss)])

    def _resume(self, content: bytes) -> None:
        """Read what is there, without a last line that was cut off."""
        with self.path.open(newline="") as file:
            version, begun = _read_conditions(self.path, file.readline())
            if version != _VERSION:
                raise ValueError(
                    f"{self.path} was begun by an earlier release (version {version} of the table, this is version "
                    f"{_VERSION}): remove the file to measure anew, or finish that run with the earlier release."
                )
            names = Conditions.__dataclass_fields__
            if different := [name for name in names if getattr(begun, name) != getattr(self.conditions, name)]:
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
