"""The matrix products of attention as modules of their own, so that both inputs of each can be quantized.

Models of transformers look their attention up in a registry (``AttentionInterface``). Here it gets one more entry: the
model's own eager attention, in which each of the two matrix products goes through a module below the attention module.
"""

import math
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layer_types import Operand, register_layer
from .preparations import Preparation, register_preparation

IMPLEMENTATION = "calibtip"
PRODUCTS = ("query_key_product", "probability_value_product")

_EAGER = "eager_attention_forward"
_PRODUCT_FUNCTIONS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}


class QueryKeyProduct(nn.Module):
    """Scores of attention: ``(batch, heads, positions, size) @ (batch, heads, size, key positions)``.

    Example:
        >>> QueryKeyProduct()(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4, 5)).shape
        torch.Size([1, 2, 3, 5])
    """

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the matrix product."""
        return torch.matmul(queries, keys)


class ProbabilityValueProduct(nn.Module):
    """Output of attention: ``(batch, heads, positions, key positions) @ (batch, heads, key positions, size)``.

    Example:
        >>> ProbabilityValueProduct()(torch.ones(1, 2, 3, 5), torch.ones(1, 2, 5, 4)).shape
        torch.Size([1, 2, 3, 4])
    """

    def forward(self, probabilities: Tensor, values: Tensor) -> Tensor:
        """Return the matrix product."""
        return torch.matmul(probabilities, values)


register_layer(
    QueryKeyProduct,
    None,
    [
        Operand(dynamic_range_axes=(-1,), token_axes=(2,), channel_axis=-1),
        Operand(dynamic_range_axes=(-2,), token_axes=(3,), channel_axis=-2),
    ],
    output_token_axes=(2, 3),
)
register_layer(
    ProbabilityValueProduct,
    None,
    [
        Operand(dynamic_range_axes=(-1,), token_axes=(2, 3), nonnegative=True),
        Operand(dynamic_range_axes=(), token_axes=(2,)),
    ],
    output_token_axes=(2,),
)


def make_product(name: str) -> nn.Module:
    """Make the product of attention of a name among ``PRODUCTS``.

    Example:
        >>> make_product("query_key_product")
        QueryKeyProduct()
    """
    return QueryKeyProduct() if name == PRODUCTS[0] else ProbabilityValueProduct()


def add_products(attention: nn.Module) -> None:
    """Give an attention module its two products, if it has none.

    Example:
        >>> attention = nn.Module()
        >>> add_products(attention)
        >>> [name for name, _ in attention.named_children()]
        ['query_key_product', 'probability_value_product']
    """
    if not hasattr(attention, PRODUCTS[0]):
        for name in PRODUCTS:
            attention.add_module(name, make_product(name).train(attention.training))


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as it is added to scores: minus infinity where a mask of bool is True.

    Raises:
        TypeError: If the mask is of integers.

    Example:
        >>> additive_mask(torch.tensor([True, False]), torch.float32)
        tensor([-inf, 0.])
    """
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"A mask of attention must be of bool or of floating point, got {mask.dtype}.")
    return mask.to(dtype)


def masked_softmax(scores: Tensor, masks: list[Tensor]) -> Tensor:
    """Probabilities of the keys; zeros for a query to which all are masked, as in PyTorch's fused attention.

    Args:
        scores: Shape (..., L, S).
        masks: What is added to the scores.

    Example:
        >>> masked_softmax(torch.zeros(1, 2), [torch.tensor([[0.0, -math.inf]])])
        tensor([[1., 0.]])
    """
    if not masks:
        return torch.softmax(scores, -1)
    for mask in masks:
        scores = scores + mask
    nothing = torch.isneginf(scores).all(-1, keepdim=True)
    # Filled before, too: the gradients of a softmax of nothing are not finite.
    return torch.softmax(scores.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)


class _Products(TorchFunctionMode):
    """Inside, the matrix products that a function computes go through an attention module's products, in turn."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.products: list[nn.Module] = [getattr(attention, name) for name in PRODUCTS]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCT_FUNCTIONS and self.products:
            return self.products.pop(0)(*args, *(kwargs or {}).values())
        return func(*args, **(kwargs or {}))


def attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Compute the eager attention of the module's own model through the module's products, which it gets at the first
    call.

    A model that has no eager attention beside its class computes as PyTorch does, in float. See ``route_attention``,
    which makes models call this function.

    Args:
        module: The attention module.
        *args: What transformers passes: queries, keys, values, mask, ...
        **kwargs: Whatever else the model passes.

    Returns:
        The output, and the probabilities if the model's own attention returns them.
    """
    eager = _eager_attention(module)
    if eager is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, *args, **kwargs)
    add_products(module)
    with _Products(module):
        return eager(module, *args, **kwargs)


def _eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    found = (getattr(sys.modules.get(cls.__module__), _EAGER, None) for cls in type(module).__mro__)
    return next(filter(None, found), None)


def transformers_models(model: nn.Module) -> dict[str, Any]:
    """Find the models of transformers inside ``model``, by name.

    Example:
        >>> transformers_models(nn.Linear(2, 2))
        {}
    """
    # Where there is such a model, its library has been imported.
    if "transformers.modeling_utils" not in sys.modules:
        return {}
    from transformers.modeling_utils import PreTrainedModel

    return {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}


def possible_products(model: nn.Module) -> list[str]:
    """List the names that the products of attention would have; only running shows which of them there are.

    Example:
        >>> possible_products(nn.Linear(2, 2))
        []
    """
    roots = list(transformers_models(model))
    names = [name for name, _ in model.named_modules() if any(name.startswith(root) for root in roots)]
    return [f"{name}.{product}" for name in names for product in PRODUCTS]


def route_attention(model: nn.Module) -> bool:
    """Make all models of transformers inside ``model`` use ``attention_forward``, and keep no cache of keys and values.

    A cache would be handed from batch to batch by whatever runs a decoder layer again.

    Args:
        model: Changed in place.

    Returns:
        Whether there is such a model.

    Example:
        >>> route_attention(nn.Linear(2, 2))
        False
    """
    models = transformers_models(model).values()
    if not models:
        return False
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface
    from transformers.pytorch_utils import Conv1D

    register_layer(Conv1D, channel_axis=1, operands=[Operand(channel_axis=-1)], input_axis=0)
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    for module in models:
        module.set_attn_implementation(IMPLEMENTATION)
        if getattr(module.config, "use_cache", False):
            module.config.use_cache = False
    return any(module.config._attn_implementation == IMPLEMENTATION for module in models)


class AttentionPreparation(Preparation):
    """Leads the attention of transformers' models to ``attention_forward``; its products appear when it first runs.

    Example:
        >>> AttentionPreparation().possible_names(nn.Linear(2, 2))
        []
    """

    def prepare(self, model: nn.Module) -> None:
        """See ``route_attention``."""
        route_attention(model)

    @torch.no_grad()
    def settle(self, model: nn.Module, run: Callable[[], Any]) -> None:
        """Run the model, so that its attention gets its products."""
        if route_attention(model):
            run()

    def restore(self, model: nn.Module, layers: Collection[str]) -> None:
        """Give attention modules the products that a plan names."""
        modules = dict(model.named_modules())
        for parent, _, child in (name.rpartition(".") for name in layers):
            if child in PRODUCTS and parent in modules:
                add_products(modules[parent])

    def possible_names(self, model: nn.Module) -> list[str]:
        """See ``possible_products``."""
        return possible_products(model)


register_preparation(AttentionPreparation())
