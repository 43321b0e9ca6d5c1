"""Additions and average pools as modules of their own, so that an engine's formats of what they read can be said.

Engines compute a residual addition in integers only if both of its operands, and its result, are quantized.
"""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .folding import is_batch_norm
from .layer_types import Operand, layer_type_of, register_layer
from .operation_kinds import OperationKind, is_activation, is_operation, register_operation
from .routing import Routes, route, search_operations

_IN_PLACE = frozenset({Tensor.add_})
_ADDITIONS = frozenset({torch.add, Tensor.add, *_IN_PLACE})
_MEANS = frozenset({torch.mean, Tensor.mean})
_POOLS = frozenset({F.avg_pool2d, F.adaptive_avg_pool2d, *_MEANS})
_LAST_TWO = ({2, 3}, {-2, -1})

BETWEEN_LAYERS = ("addition", "average_pool")


class Addition(nn.Module):
    """Sum of two tensors, each of which an engine may want quantized.

    Example:
        >>> Addition()(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the sum, in a new tensor."""
        return torch.add(first, second)


class AveragePool(nn.Module):
    """Average over positions of an image, of whatever kind the model computes.

    Example:
        >>> AveragePool()(torch.ones(1, 2, 4, 4), lambda x: x.mean((2, 3)))
        tensor([[1., 1.]])
    """

    def forward(self, x: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the model's own function makes of an image of shape (N, C, H, W)."""
        return pool(x)


_image = Operand((-3, -2, -1), ())
register_layer(Addition, None, [Operand(), Operand()], between_layers=True)
register_layer(AveragePool, None, [_image], _image.token_axes, between_layers=True)


def _is_addition(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return len(args) == 2 and not kwargs and all(map(is_activation, args))


def _is_pool(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if not args or not is_activation(args[0]) or args[0].dim() != 4:
        return False
    if func in _MEANS:
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(dims, tuple | list) or set(dims) not in _LAST_TWO or "dtype" in kwargs:
            return False
    # Engines differ in how many elements of a window that hangs over the edge they divide by.
    return not (func is F.avg_pool2d and kwargs.get("ceil_mode", args[4] if len(args) > 4 else False))


register_operation(
    OperationKind(
        "addition", _ADDITIONS, _is_addition, Addition, lambda module, func, args, kwargs: module(*args), _IN_PLACE
    )
)
register_operation(
    OperationKind(
        "average_pool",
        _POOLS,
        _is_pool,
        AveragePool,
        lambda module, func, args, kwargs: module(args[0], lambda x: func(x, *args[1:], **kwargs)),
    )
)


@torch.no_grad()
def find_operations(model: nn.Module, run: Callable[[], Any], routed: Routes = Routes()) -> Routes:  # noqa: B008
    """Find the additions and average pools that can be modules of their own: as such they reproduce what ``run``
    returns.

    Those inside of layers of a quantizable type are the layer's own and are not found.

    Args:
        model: Left as it is.
        run: Calls the model on one batch and returns its output.
        routed: What is led to modules already.

    Returns:
        The same with the operations that were found.

    Example:
        >>> class Residual(nn.Module):
        ...     def forward(self, x):
        ...         return x + x.relu()
        >>> model = Residual()
        >>> find_operations(model, lambda: model(torch.ones(1, 2))).operations
        ('addition_0',)
    """
    found = search_operations(model, run, computes_its_own, {}, routed)
    between = {name: in_place for name, in_place in found.operations.items() if is_operation(name) in BETWEEN_LAYERS}
    # A sum in place may be needed where it was; then it cannot be computed elsewhere.
    for names in (list(between), [name for name, in_place in between.items() if not in_place]):
        routes = Routes((*routed.operations, *names), routed.layers)
        route(model, routes)
        same = _is_same(run(), found.output)
        route(model, routed)
        if same:
            return routes
    return routed


def computes_its_own(module: nn.Module) -> bool:
    """Whether what a module computes is a part of a layer, or of a BatchNorm, and no operation between layers.

    Example:
        >>> computes_its_own(nn.Linear(2, 2)), computes_its_own(nn.ReLU())
        (True, False)
    """
    return layer_type_of(module) is not None or is_batch_norm(module)


def _is_same(output: Any, wanted: Any) -> bool:
    """Whether outputs hold the same tensors; False where there is nothing to compare."""
    given, reference = tensors_of(output), tensors_of(wanted)
    return len(given) == len(reference) > 0 and all(map(torch.equal, given, reference))


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors that a model has returned, in dataclasses too.

    Example:
        >>> len(tensors_of({"logits": torch.ones(1), "names": ["a"]}))
        1
    """
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += tensors_of(list(vars(leaf).values()))
    return found
