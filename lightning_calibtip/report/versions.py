"""Versions of what a run was made with."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("lightning-calibtip", "lightning", "torchmetrics")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes; those that are not installed as packages
    are left out.

    Example:
        >>> "torch" in versions()
        True
    """
    # Only torch itself knows what it was built for.
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
