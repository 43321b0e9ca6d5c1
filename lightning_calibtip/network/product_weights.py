"""Parameters that a module multiplies with in products of its own, as modules, so that each can be quantized: weights
of recurrent layers, stacked weights of experts, and whatever a user's ``forward`` gives to ``@`` or ``einsum``."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from .layer_types import register_layer

# Behind the parameter's name, which stays that of the tensor, in the name of its module.
_SUFFIX = "_matrix"

# Where an owner keeps the weights that it has read while its ``forward`` runs, with and without gradients.
_READ = "_weights_read"


class ProductWeight(nn.Module):
    """One parameter of another module, whose products sum over one of its dimensions.

    It is kept as a matrix, with a row for each combination of the other dimensions: the output channels, of each expert
    where weights of several are stacked. Calling it gives the parameter as its owner knows it.

    Args:
        parameter: The parameter, of two dimensions or more.
        sums_over: Dimension that the products sum over.

    Example:
        >>> stacked = nn.Parameter(torch.arange(12.0).view(2, 3, 2))
        >>> weight = ProductWeight(stacked, sums_over=1)
        >>> weight.weight.shape, torch.equal(weight(), stacked)
        (torch.Size([4, 3]), True)
    """

    def __init__(self, parameter: Tensor, sums_over: int) -> None:
        super().__init__()
        self.shape, self.sums_over = parameter.shape, sums_over
        self.weight = nn.Parameter(self.rows(parameter), requires_grad=parameter.requires_grad)

    def rows(self, parameter: Tensor) -> Tensor:
        """The matrix of a parameter of the owner's shape."""
        return parameter.detach().movedim(self.sums_over, -1).reshape(-1, self.shape[self.sums_over]).clone()

    def forward(self) -> Tensor:
        """Return the parameter, in the shape and the memory layout that it had."""
        others = [length for dim, length in enumerate(self.shape) if dim != self.sums_over]
        return self.weight.unflatten(0, others).movedim(-1, self.sums_over).contiguous()

    def extra_repr(self) -> str:
        """Describe the parameter for ``print(model)``."""
        return f"{tuple(self.shape)}, sums_over={self.sums_over}"


register_layer(ProductWeight, 0, operands=(), output_token_axes=(), part=True)


def hold_weights(owner: nn.Module, sums_over: Mapping[str, int], members: Mapping[str, Any] | None = None) -> None:
    """Move parameters of a module into modules of their own below it: ``gate`` into ``gate_matrix``.

    The owner's class becomes a subclass of the user's, in which the old names are properties that give the parameters,
    as rounded as the modules are. State dicts from before can still be loaded.

    Args:
        owner: Changed in place.
        sums_over: Dimension that products sum over, by the name of the parameter.
        members: What else the subclass has.

    Example:
        >>> class Projection(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.eye(2))
        ...     def forward(self, x):
        ...         return x @ self.factor
        >>> model = Projection()
        >>> hold_weights(model, {"factor": 0})
        >>> model(torch.ones(1, 2)), list(model.state_dict()), isinstance(model, Projection)
        (tensor([[1., 1.]], grad_fn=<MmBackward0>), ['factor_matrix.weight'], True)
    """
    for name, axis in sums_over.items():
        parameter = owner._parameters.pop(name)
        assert parameter is not None
        owner.add_module(module_name(name), ProductWeight(parameter, axis).train(owner.training))
    cls = type(owner)
    properties = {name: _reading(name) for name in sums_over}
    added = {"forward": _keeping(cls), "_load_from_state_dict": _loading(cls, tuple(sums_over))}
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    owner.__class__ = type(cls.__name__, (cls,), {**names, **properties, **added, **(members or {})})


def held_weights(module: nn.Module) -> dict[str, ProductWeight]:
    """The modules that ``hold_weights`` has made of a module's parameters, by the names of these.

    Example:
        >>> held_weights(nn.Linear(2, 2))
        {}
    """
    children = module._modules.items()
    return {name.removesuffix(_SUFFIX): child for name, child in children if isinstance(child, ProductWeight)}


def module_name(parameter: str) -> str:
    """Name of the module that holds a parameter, from the (full) name of the parameter.

    Example:
        >>> module_name("experts.up")
        'experts.up_matrix'
    """
    return f"{parameter}{_SUFFIX}"


def parameter_name(module: str) -> str:
    """Inverse of ``module_name``.

    Example:
        >>> parameter_name("experts.up_matrix")
        'experts.up'
    """
    return module.removesuffix(_SUFFIX)


def _reading(name: str) -> property:
    def read(owner: nn.Module) -> Any:
        key, kept = (name, torch.is_grad_enabled()), owner.__dict__.get(_READ)
        if kept is not None and key in kept:
            return kept[key]
        child: Any = owner._modules[module_name(name)]
        value = child()
        if kept is not None:
            kept[key] = value
        return value

    return property(read)


def _keeping(cls: type[nn.Module]) -> Callable[..., Any]:
    """The ``forward`` of a class, during which each weight is rounded once, however often it is read."""

    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _kept(self):
            return cls.forward(self, *args, **kwargs)

    return forward


@contextmanager
def _kept(owner: nn.Module) -> Iterator[None]:
    if _READ in owner.__dict__:
        yield
        return
    owner.__dict__[_READ] = {}
    try:
        yield
    finally:
        del owner.__dict__[_READ]


def _loading(cls: type[nn.Module], names: tuple[str, ...]) -> Callable[..., None]:
    """The ``_load_from_state_dict`` of a class, which also takes the parameters as they were."""

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in names:
            child: Any = self._modules[module_name(name)]
            if (parameter := state_dict.pop(f"{prefix}{name}", None)) is not None:
                fits = parameter.shape == child.shape
                # One of another shape is refused below, by its own shape.
                state_dict[f"{prefix}{module_name(name)}.weight"] = child.rows(parameter) if fits else parameter
        cls._load_from_state_dict(self, state_dict, prefix, *args)

    return load
