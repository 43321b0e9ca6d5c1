"""Parameters that several modules share, and parameters that are computed: what a layer must have for itself."""

from collections import defaultdict
from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from .kinds import reads_indices


def bake_parametrizations(layer: nn.Module) -> None:
    """Make parametrized tensors (weight norm, spectral norm) plain parameters of their present value."""
    for tensor in list(getattr(layer, "parametrizations", {})):
        remove_parametrization(layer, tensor, keep_value=True)
        value = getattr(layer, tensor)
        delattr(layer, tensor)
        layer.register_parameter(tensor, nn.Parameter(value.detach().clone(), requires_grad=False))


def remove_parametrization(layer: nn.Module, tensor: str, keep_value: bool) -> None:
    """``parametrize.remove_parametrizations``, of this layer alone."""
    # A deep copy shares its class with the original, and removing changes the class.
    cls = type(layer)
    layer.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    parametrize.remove_parametrizations(layer, tensor, leave_parametrized=keep_value)


def share_parametrization(layer: nn.Module, owner: nn.Module) -> None:
    """Let a layer that shares its weight with ``owner``, whose weight is parametrized, share the parametrization."""
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    layer.parametrizations["weight"] = owner.parametrizations["weight"]  # type: ignore[index, operator]


def stop_sharing_parametrization(layer: nn.Module) -> None:
    """Inverse of ``share_parametrization``."""
    original = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
    del layer.parametrizations
    layer.__class__ = type(layer).__mro__[1]
    layer.register_parameter("weight", original)


def untie(model: nn.Module, layers: Iterable[nn.Module]) -> tuple[list[nn.Module], dict[nn.Module, nn.Module]]:
    """See to parameters that layers share: weights of an embedding stay tied, everything else gets a copy of its own.

    Args:
        model: All of it.
        layers: Those that are to be quantized.

    Returns:
        The layers that were given a copy; and the layers that are tied to an embedding's weight, with that embedding.
    """
    layers = list(layers)
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] += parameter is not None
    embeddings: dict[int, nn.Module] = {}
    for layer in layers:
        if reads_indices(layer):
            embeddings.setdefault(id(layer._parameters.get("weight")), layer)
    untied: list[nn.Module] = []
    tied = {}
    for layer in layers:
        for name, parameter in layer._parameters.items():
            if parameter is None or owners[id(parameter)] < 2:
                continue
            embedding = embeddings.get(id(parameter))
            if name == "weight" and embedding is not None:
                if layer is not embedding:
                    tied[layer] = embedding
                continue
            owners[id(parameter)] -= 1
            own_parameter(layer, name)
            untied.append(layer)
    return untied, tied


def own_parameter(layer: nn.Module, name: str) -> None:
    """Give a layer a copy of its own of a parameter."""
    parameter = layer._parameters[name]
    assert parameter is not None
    layer._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
