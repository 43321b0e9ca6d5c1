"""What a module multiplies with its own parameters, as modules, so that it can be quantized."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .layer_types import Operand, register_layer
from .product_weights import module_name

_SUFFIX = "_input"

# Products, and the position of the first factor among the tensors that they are given; the second one follows.
_PRODUCTS: dict[Any, int] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.einsum, F.linear), 0),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.mv, Tensor.mv), 0),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.addmv, Tensor.addmv), 1),
    **{getattr(place, name): 0 for place, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(place, name)},
}

# What gives numbers of a tensor in another storage.
_MOVES = {
    Tensor.__getitem__, Tensor.index_select, torch.index_select, Tensor.contiguous, Tensor.to, Tensor.clone,
    torch.clone, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten,
}  # fmt: skip


class ProductInput(nn.Module):
    """What a parameter is multiplied with, as a module of its own, so that it can be quantized.

    Example:
        >>> ProductInput()(torch.ones(1))
        tensor([1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


# Nothing is known of its dimensions.
register_layer(ProductInput, None, [Operand((), ())], (), part=True)


def input_name(parameter: str) -> str:
    """Name of the module for what a parameter is multiplied with, from the (full) name of the parameter.

    Example:
        >>> input_name("experts.up")
        'experts.up_input'
    """
    return f"{parameter}{_SUFFIX}"


def hold_inputs(owner: nn.Module, parameters: Sequence[str]) -> None:
    """Let what a module multiplies with parameters, while its ``forward`` runs, go through modules of its own.

    Args:
        owner: Changed in place; after ``hold_weights``.
        parameters: Names of the parameters.

    Example:
        >>> from lightning_calibtip.network.product_weights import hold_weights
        >>> class Projection(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.eye(2))
        ...     def forward(self, x):
        ...         return x @ self.factor
        >>> model = Projection()
        >>> hold_weights(model, {"factor": 0})
        >>> hold_inputs(model, ["factor"])
        >>> _ = model.factor_input.register_forward_hook(lambda module, args, output: output + 1)
        >>> model(torch.ones(1, 2)).detach()
        tensor([[2., 2.]])
    """
    for name in parameters:
        owner.add_module(input_name(name), ProductInput().train(owner.training))
    cls: Any = type(owner)
    cls.forward = _through_inputs(cls.forward, tuple(parameters))


def _through_inputs(computed: Callable[..., Any], parameters: tuple[str, ...]) -> Callable[..., Any]:
    """The ``forward`` of a class, whose inputs of products go through the modules for them."""

    @wraps(computed)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Inputs(self, parameters):
            return computed(self, *args, **kwargs)

    return forward


class _Inputs(TorchFunctionMode):
    """Knows the weights of a module by the storages of their values, also where these were moved."""

    def __init__(self, owner: nn.Module, parameters: tuple[str, ...]) -> None:
        super().__init__()
        self.places = [(owner._modules[module_name(name)], owner._modules[input_name(name)]) for name in parameters]
        self.inputs: dict[int, tuple[StorageWeakRef, Any]] = {}

    def __enter__(self) -> "_Inputs":
        self.hooks = [
            weight.register_forward_hook(self._note(site))  # type: ignore[union-attr]
            for weight, site in self.places
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _note(self, site: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self._remember(output, site)

        return hook

    def _remember(self, value: Tensor, site: Any) -> None:
        storage = value.untyped_storage()
        self.inputs[storage._cdata] = (StorageWeakRef(storage), site)

    def _input_of(self, value: Any) -> Any:
        """The module for what a tensor is multiplied with, if it holds numbers of a weight; else None."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        known = self.inputs.get(value.untyped_storage()._cdata)
        return None if known is None or known[0].expired() else known[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args, kwargs = self._quantized(func, args, kwargs)
        output = func(*args, **kwargs)
        if func in _MOVES and isinstance(output, Tensor) and (site := self._input_of(args[0])) is not None:
            self._remember(output, site)
        return output

    def _quantized(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The arguments of a product, of which one that is multiplied with a weight has gone through its module."""
        leaves, tree = tree_flatten((args, kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        factors = tensors[_PRODUCTS[func] :][:2]
        if len(factors) < 2 or (func is torch.einsum and len(tensors) > 2):
            return args, kwargs
        sites = [self._input_of(leaves[i]) for i in factors]
        for place, site, own in zip(factors, reversed(sites), sites, strict=True):
            if site is not None and own is None and leaves[place].is_floating_point():
                leaves[place] = site(leaves[place])
        return tree_unflatten(leaves, tree)
