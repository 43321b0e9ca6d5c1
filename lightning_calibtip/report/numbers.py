"""How numbers are written on the page: one format for all of them."""

import math
from typing import Any

# What is shown for a missing value; the page's script knows it too.
MISSING = "-"

_PREFIXES = ("", "k", "M", "G", "T", "P")


def number(value: Any) -> str:
    """A cell of a table: four significant digits, thousands with separators, whole numbers in full.

    Args:
        value: A number, text, or None.

    Example:
        >>> [number(value) for value in (None, "conv1", 12345, 12345.6, 0.123456, float("inf"))]
        ['-', 'conv1', '12,345', '12,346', '0.1235', 'inf']
    """
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and 1000 <= abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def signed(value: float | None) -> str:
    """A difference: as ``number``, with its sign.

    Args:
        value: The difference, or None.

    Example:
        >>> signed(0.25), signed(-0.25), signed(0.0)
        ('+0.25', '-0.25', '0')
    """
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def short(value: float | None, unit: str = "") -> str:
    """A large number with a prefix in place of its zeros.

    Args:
        value: The number, or None.
        unit: Unit that follows the prefix.

    Example:
        >>> short(1234567, "B"), short(12, "B"), short(2.5e9)
        ('1.235 MB', '12 B', '2.5 G')
    """
    if value is None:
        return MISSING
    power = 0
    while abs(value) >= 999.95 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {_PREFIXES[power]}{unit}".rstrip()


def percent(value: float | None) -> str:
    """A share, in per cent.

    Args:
        value: The share, 1 being all, or None.

    Example:
        >>> percent(0.25)
        '25.0%'
    """
    return MISSING if value is None else f"{value:.1%}"


def sort_key(value: float) -> str:
    """A number as JavaScript reads it.

    Args:
        value: The number.

    Example:
        >>> sort_key(float("-inf")), sort_key(0.5)
        ('-Infinity', '0.5')
    """
    return str(value).replace("inf", "Infinity").replace("nan", "NaN")
