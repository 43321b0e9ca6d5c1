"""Digests of tensors, by which a run recognises whether what it finds on disk is its own."""

import logging
import secrets
from collections.abc import Iterable
from typing import Any

from torch.utils._pytree import tree_leaves

from ..batches import plain
from ..files.digest import UnrecognizableError, digest
from ..network.states import LayerState
from .calibration_set import CalibrationSet

log = logging.getLogger(__name__)


def describe_function(function: Any) -> str:
    """Name of a function and the first digits of its digest.

    Of one that cannot be recognised in another process, the digits are random, and the reason follows.

    Args:
        function: Function, partial, module, or any other callable object.

    Example:
        >>> describe_function(abs)[:13]
        'builtins.abs#'
        >>> describe_function(lambda x, source=(n for n in "ab"): x)  # doctest: +ELLIPSIS
        '...<lambda>#... (a generator cannot be recognised in another process)'
    """
    inner = getattr(function, "func", function)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    name = f"{getattr(named, '__module__', '') or ''}.{named.__qualname__}"
    return f"{name}#{_recognised([function], name)}"


def _recognised(values: Iterable[Any], what: str) -> str:
    """First digits of a digest; random ones and a reason, and a warning, where there is none."""
    try:
        return digest(values)[:12]
    except (UnrecognizableError, RecursionError) as error:
        reason = str(error) if isinstance(error, UnrecognizableError) else "it is nested too deeply"
        log.warning("%s: a run that depends on it cannot be resumed: %s.", what, reason)
        return f"{secrets.token_hex(6)} ({reason})"


def digest_states(states: Iterable[LayerState]) -> str:
    """Digest of everything in these states of layers. See ``digest``.

    Args:
        states: States, in a fixed order.
    """
    return digest(leaf for state in states for leaf in tree_leaves(state.to_dict()))


def digest_data(calibration: CalibrationSet) -> str:
    """First digits of the digest of all calibration batches. See ``digest`` and ``describe_function``.

    Args:
        calibration: Calibration set.
    """
    return _recognised(tree_leaves([plain(batch) for batch in calibration.batches]), "The calibration data")
