"""The registry of kinds of function calls that modules can compute."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class OperationKind:
    """A kind of function calls that modules can compute.

    Args:
        name: Name of its modules, before their number.
        functions: The functions.
        recognises: Whether a call, by its function, arguments and keyword arguments, is one that a module can compute.
            The answer must depend on no shape, so that positions stay the same from batch to batch.
        module: Class of the modules, made without arguments.
        compute: Computes a call by its module: ``compute(module, func, args, kwargs)``.
        in_place: Those of the functions that change their first argument.

    Example:
        See ``operations`` and ``functional``, which register two each.
    """

    name: str
    functions: frozenset[Any]
    recognises: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], bool]
    module: type[nn.Module]
    compute: Callable[[nn.Module, Any, tuple[Any, ...], Mapping[str, Any]], Any]
    in_place: frozenset[Any] = frozenset()


_KINDS: dict[str, OperationKind] = {}
_KIND_OF: dict[Any, OperationKind] = {}


def register_operation(kind: OperationKind) -> None:
    """Make a kind of function calls known.

    Example:
        See ``operations``.
    """
    _KINDS[kind.name] = kind
    _KIND_OF.update(dict.fromkeys(kind.functions, kind))


def is_activation(value: Any) -> bool:
    """Whether an argument of a function is a tensor that a model may have computed.

    Example:
        >>> import torch
        >>> is_activation(torch.ones(2, 2)), is_activation(nn.Parameter(torch.ones(2, 2))), is_activation(1)
        (True, False, False)
    """
    is_tensor = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return is_tensor and value.is_floating_point() and value.dim() > 1


def kind_of_call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> OperationKind | None:
    """Kind of a function call; None if no module computes such ones.

    Example:
        >>> import torch
        >>> kind_of_call(torch.relu, (torch.ones(2),), {}) is None
        True
    """
    kind = _KIND_OF.get(func)
    return kind if kind is not None and kind.recognises(func, args, kwargs) else None


def kind_named(name: str) -> OperationKind:
    """The kind of operations with a name.

    Raises:
        KeyError: If there is none.

    Example:
        >>> from lightning_calibtip.network import operations
        >>> kind_named("addition").module.__name__
        'Addition'
    """
    return _KINDS[name]


def is_operation(name: str) -> str | None:
    """Kind of the operation whose module has this name; None for other names.

    Example:
        >>> from lightning_calibtip.network import operations
        >>> is_operation("layer1.0.addition_0"), is_operation("layer1.0.conv1")
        ('addition', None)
    """
    match = re.fullmatch(r"(\w+)_\d+", name.rpartition(".")[2])
    return match[1] if match and match[1] in _KINDS else None
