"""Matrix products that a model computes by functions, as modules of their own, so that both operands can be quantized:
fused attention, products of two activations, and linear functions of a layer's weight."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import add_products, additive_mask, masked_softmax
from .layer_types import Operand, is_linear, layer_type_of, register_layer
from .operation_kinds import OperationKind, is_operation, register_operation
from .operations import computes_its_own, tensors_of
from .product_parameters import follow_moves
from .routing import Routes, route, search_operations
from .structure import Structure

log = logging.getLogger(__name__)

# The products of attention are computed in another order than by the fused function.
_TOLERANCE = 1e-3

_PRODUCTS = frozenset({torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__})
_KINDS = ("fused_attention", "matrix_product")


class MatrixProduct(nn.Module):
    """Product of two activations, of whatever kind the model computes.

    Example:
        >>> MatrixProduct()(torch.ones(1, 2), torch.ones(2, 1), torch.matmul)
        tensor([[2.]])
    """

    def forward(self, first: Tensor, second: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return what the model's own function makes of both."""
        return product(first, second)


# Nothing is known of their dimensions.
_operand = Operand((), ())
register_layer(MatrixProduct, None, [_operand, _operand], ())


class FusedAttention(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention`` with its two matrix products as modules.

    Example:
        >>> x = torch.randn(1, 2, 3, 4)
        >>> torch.allclose(FusedAttention()(x, x, x), F.scaled_dot_product_attention(x, x, x), atol=1e-5)
        True
    """

    query_key_product: nn.Module
    probability_value_product: nn.Module

    def __init__(self) -> None:
        super().__init__()
        add_products(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute what the function does, with the same arguments: tensors of shape (N, ..., L, E)."""
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        if query.dim() == 3:
            mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
            q, k, v = (x.unsqueeze(1) for x in (query, key, value))
            return self.forward(q, k, v, mask, dropout_p, is_causal, scale).squeeze(1)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = self.query_key_product(query, key.transpose(-2, -1)) * factor
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # Here a mask says what counts; elsewhere, what does not.
            attn_mask = ~attn_mask
        probabilities = masked_softmax(scores, [] if attn_mask is None else [additive_mask(attn_mask, scores.dtype)])
        output: Tensor = self.probability_value_product(F.dropout(probabilities, dropout_p), value)
        return output


def _is_attention(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    tensors = [*args, *(kwargs.get(name) for name in ("query", "key", "value"))]
    return sum(map(_is_matrix, tensors)) >= 3


def _is_product(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if func is torch.einsum:
        args = args[1:] if args and isinstance(args[0], str) else ()
    return len(args) == 2 and not kwargs and all(map(_is_matrix, args))


def _is_matrix(value: Any) -> bool:
    # Parameters count, too: whether a weight is one changes when it is quantized, and positions must not.
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _compute_product(module: nn.Module, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    *equation, first, second = args
    return module(first, second, lambda a, b: func(*equation, a, b))


register_operation(
    OperationKind(
        "fused_attention",
        frozenset({F.scaled_dot_product_attention}),
        _is_attention,
        FusedAttention,
        lambda module, func, args, kwargs: module(*args, **kwargs),
    )
)
register_operation(
    OperationKind("matrix_product", _PRODUCTS | {torch.einsum}, _is_product, MatrixProduct, _compute_product)
)


@torch.no_grad()
def find_products(model: nn.Module, run: Callable[[], Any], record: Callable[[], Structure]) -> Routes:
    """Find the matrix products that can be modules of their own, and the linear functions that can be calls of the
    layer whose weight they take: as such they reproduce what ``run`` returns.

    Only products of what layers have computed count, not those of positions, say. Where not all reproduce the output,
    fused attention alone is tried.

    Args:
        model: Left as it is.
        run: Calls the model on one batch and returns its output.
        record: Calls the model on the same batch and returns its structure.

    Example:
        >>> from lightning_calibtip.network.observe import record
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv = nn.Linear(4, 12)
        ...     def forward(self, x):
        ...         return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))
        >>> model, x = Attention(), torch.randn(2, 3, 4)
        >>> find_products(model, lambda: model(x), lambda: record(model, lambda: model(x))).operations
        ('fused_attention_0',)
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    found = search_operations(model, run, computes_its_own, linear, Routes())
    # A weight that several modules take, or one that it is handed to, would not always be known again.
    alone = {name: owners.pop() for name, owners in found.layers.items() if len(owners) == 1}
    layers = {name: owner for name, owner in alone.items() if not owner or name.startswith(f"{owner}.")}
    names = [name for name in found.operations if is_operation(name) in _KINDS]
    fused = tuple(name for name in names if is_operation(name) == "fused_attention")
    for wanted in (Routes(tuple(names), layers), Routes(tuple(names)), Routes(fused)):
        try:
            route(model, wanted)
            computed = _of_layers(record(), model) if wanted.operations else set()
            routes = Routes(tuple(name for name in wanted.operations if name in computed), wanted.layers)
            route(model, Routes())
            route(model, routes)
            if routes and is_close(run(), found.output):
                return routes
        except Exception as error:
            log.warning("Not all products can be led to modules of their own (%s: %s).", type(error).__name__, error)
        finally:
            route(model, Routes())
    return Routes()


def _of_layers(structure: Structure, model: nn.Module) -> set[str]:
    """Operations both of whose operands depend on what layers with weights have computed."""
    types = {name: layer_type_of(module) for name, module in model.named_modules()}
    layers = {name for name, layer_type in types.items() if layer_type is not None and layer_type.weight is not None}
    computed: set[int] = set()
    for operator in structure.operators:
        inside = any(structure.calls[index].name in layers for index in operator.scope)
        if inside or any(read.storage in computed for read in operator.reads):
            # A view of a weight is no result.
            reads = {(read.storage, read.version) for read in operator.reads}
            computed.update(write.storage for write in operator.writes if (write.storage, write.version) not in reads)
    # A parameter that was picked from by what was computed is none, either.
    computed -= follow_moves(structure.operators, set(structure.parameters.values()))
    found = set()
    for name, calls in structure.calls_of.items():
        kind = is_operation(name)
        count = 3 if kind == "fused_attention" else 2
        operands = [operand for call in calls for operand in call.operands[:count]]
        if kind in _KINDS and all(operand is not None and operand.storage in computed for operand in operands):
            found.add(name)
    return found


def is_close(output: Any, wanted: Any) -> bool:
    """Whether outputs hold the same tensors, up to rounding; False where there is nothing to compare.

    Example:
        >>> is_close([torch.ones(2)], [torch.ones(2) + 1e-6]), is_close(torch.ones(2), torch.zeros(2))
        (True, False)
    """
    given, reference = tensors_of(output), tensors_of(wanted)
    return len(given) == len(reference) > 0 and all(map(_are_close, given, reference))


def _are_close(given: Tensor, wanted: Tensor) -> bool:
    if given.shape != wanted.shape or not wanted.is_floating_point():
        return torch.equal(given, wanted)
    finite = torch.isfinite(wanted)
    if not torch.equal(torch.isfinite(given), finite):
        return False
    given, wanted = given[finite], wanted[finite]
    return not wanted.numel() or float((given - wanted).norm()) <= _TOLERANCE * float(wanted.norm()) + 1e-6
