"""Versions of what a run was made with."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("lightning-calibtip", "torch", "lightning", "torchmetrics")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes; those that are not installed as packages
    are left out.

    Example:
        >>> "torch" in versions()
        True
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
