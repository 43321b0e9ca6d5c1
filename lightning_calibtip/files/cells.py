"""Cells of tables that people open in a spreadsheet, which takes some text for formulas."""

from typing import Any

_BEGINNINGS = ("=", "+", "-", "@", "\t", "\r")


def inert(cell: Any) -> Any:
    """A cell that is no formula: text that begins like one gets an apostrophe before it.

    Example:
        >>> inert("=HYPERLINK()"), inert("conv1"), inert(-1)
        ("'=HYPERLINK()", 'conv1', -1)
    """
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip("'").startswith(_BEGINNINGS) else cell


def original(cell: str) -> str:
    """Inverse of ``inert``.

    Example:
        >>> original(inert("=1")), original(inert("'=1")), original("'a")
        ('=1', "'=1", "'a")
    """
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_BEGINNINGS) else cell
