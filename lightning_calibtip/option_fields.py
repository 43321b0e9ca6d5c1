"""Frozen option dataclasses with some fields changed, where a wrong name is answered with the right one."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar

Options = TypeVar("Options")


def check_names(kind: Any, names: Iterable[str], place: str) -> None:
    """Raise ``TypeError`` if a name is no field of a dataclass; the message suggests the nearest one and lists all.

    Args:
        kind: The dataclass, or an instance of it.
        names: Names as the user gave them.
        place: Where they were given, for the message.

    Example:
        See ``with_changes``.
    """
    require_known(names, field_names(kind), place)


def field_names(kind: Any) -> list[str]:
    """Names of the fields that a dataclass is made from.

    Example:
        >>> from lightning_calibtip.calibration.options import StorageOptions
        >>> field_names(StorageOptions)[0]
        'activation_budget'
    """
    return [field.name for field in fields(kind) if field.init]


def argument_names(call: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a function or method, without ``self`` and those that it takes by any name.

    Example:
        >>> argument_names(field_names)
        ['kind']
    """
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD]


def require_known(names: Iterable[str], known: Sequence[str], place: str) -> None:
    """Raise ``TypeError`` if a name is none of those that are known; the message suggests the nearest and lists all.

    Args:
        names: Names as the user gave them.
        known: All names that there are.
        place: Where they were given, for the message.

    Example:
        >>> require_known(["bits"], ["weight_bits", "activation_bits"], "quantize")
        Traceback (most recent call last):
        ...
        TypeError: quantize: unknown option 'bits'. The options are: weight_bits, activation_bits.
    """
    for name in names:
        if name not in known:
            nearest = get_close_matches(str(name), known, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise TypeError(f"{place}: unknown option {name!r}{hint} The options are: {', '.join(known)}.")


def with_changes(options: Options, changes: Mapping[str, Any], place: str) -> Options:
    """Return frozen options with some of their fields changed.

    Args:
        options: Instance of a dataclass.
        changes: New values by the names of fields.
        place: Where the changes were given, for the message about a wrong name.

    Raises:
        TypeError: If a name is none of the fields.
        ValueError: If the dataclass refuses a value.

    Example:
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> with_changes(QuantizationScheme(), {"weight_bits": 4}, "scheme").weight_bits
        4
        >>> with_changes(QuantizationScheme(), {"weight_bit": 4}, "scheme")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: scheme: unknown option 'weight_bit'; did you mean 'weight_bits'? The options are: weight_bits, ...
    """
    check_names(options, changes, place)
    return replace(options, **changes)  # type: ignore[type-var]


def require_count(value: Any, name: str) -> None:
    """Raise unless a value is an integer of at least 1.

    Args:
        value: The value.
        name: Name of the option, for the message.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> require_count(1.5, "calibration_samples")
        Traceback (most recent call last):
        ...
        ValueError: calibration_samples must be an integer of at least 1, got 1.5.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
