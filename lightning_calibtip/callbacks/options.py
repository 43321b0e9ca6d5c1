"""How a stage takes its options: as one dataclass, as single fields of it, or as both."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from ..calibration.options import StorageOptions
from ..option_fields import check_names, with_changes

Options = TypeVar("Options")


def merge_fields(
    stage: str, kind: type[Options], options: Options | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Values for the fields of a stage's options, from an instance of them and single fields that differ from it.

    A stage passes them on at once, ``Kind(**changes)``: from that call jsonargparse learns which arguments the stage
    takes besides its own.

    Args:
        stage: Name of the stage, for messages.
        kind: Dataclass of the options.
        options: The options; None for the defaults.
        changes: Fields that differ from ``options``.

    Raises:
        TypeError: If a change is no field of the options, or ``options`` is no instance of their dataclass.

    Example:
        >>> from lightning_calibtip.tuning.bias import BiasTuningOptions
        >>> changes = merge_fields("BiasTuning", BiasTuningOptions, BiasTuningOptions(epochs=2), {"seed": 3})
        >>> changes["epochs"], changes["seed"]
        (2, 3)
        >>> merge_fields("BiasTuning", BiasTuningOptions, None, {"epoch": 2})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: BiasTuning: unknown option 'epoch'; did you mean 'epochs'? The options are: epochs, ...
    """
    check_names(kind, changes, stage)
    if options is None:
        return dict(changes)
    if not isinstance(options, kind):
        raise TypeError(
            f"{stage} takes {kind.__name__}, or its fields by name ({fields(kind)[0].name}=...), got {options!r}."  # type: ignore[arg-type]
        )
    given = {field.name: getattr(options, field.name) for field in fields(options)}  # type: ignore[arg-type]
    if changes.keys() == given.keys():
        # Only a parser gives every single field: it fills in the defaults of those that its user has not set, and these
        # must not undo the options.
        default = kind()
        changes = {name: value for name, value in changes.items() if not _same(value, getattr(default, name))}
    return {**given, **changes}


def _same(value: Any, other: Any) -> bool:
    """Whether values are equal; a parser makes lists of all sequences."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return list(value) == list(other)
    return bool(value == other)


def storage_options(stage: str, storage: StorageOptions | Mapping[str, Any] | None) -> StorageOptions:
    """Options of a stage's storage from whatever the user gave for them.

    Args:
        stage: Name of the stage, for messages.
        storage: The options, a mapping of the fields that differ from the defaults, or None for the defaults.

    Raises:
        TypeError: If it is none of these, or an option does not exist.
        ValueError: If a value is out of its range.

    Example:
        >>> storage_options("AdaQuant", {"precision": "bfloat16"}).precision
        'bfloat16'
    """
    if storage is None or isinstance(storage, StorageOptions):
        return storage or StorageOptions()
    if not isinstance(storage, Mapping):
        raise TypeError(f"{stage}: storage must be StorageOptions or a mapping of its fields, got {storage!r}.")
    return with_changes(StorageOptions(), storage, f"{stage}: storage")
