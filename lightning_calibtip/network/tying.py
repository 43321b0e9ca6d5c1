"""Parameters that several modules share, and parameters that are computed: what a layer must have of its own."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from .layer_types import layer_type_of, reads_indices


@dataclass(frozen=True)
class Ties:
    """What becomes of the parameters that layers share with other modules.

    Args:
        copies: Names of the parameters of which a layer needs a copy of its own, by the layer's name.
        tied: Name of the embedding whose weight a layer shares and goes on sharing, by the layer's name.

    Example:
        See ``find_ties``.
    """

    copies: dict[str, tuple[str, ...]]
    tied: dict[str, str]


def find_ties(model: nn.Module, layers: Mapping[str, nn.Module]) -> Ties:
    """Find the parameters that layers share: weights of an embedding stay tied, of everything else a layer needs a copy
    of its own unless it is the last module that holds the parameter.

    The model is not changed. Parametrized tensors of the layers count as their own, as ``bake_parametrizations`` makes
    them.

    Args:
        model: The whole model.
        layers: Its layers that are to be quantized, by their full names. Their order does not count, that of the model
            does.

    Returns:
        Which layers need copies, and which are tied to an embedding.

    Example:
        >>> model = nn.ModuleDict({"table": nn.Embedding(4, 3), "a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
        >>> model["a"].weight = model["table"].weight
        >>> model["a"].bias = model["b"].bias
        >>> find_ties(model, dict(model.items()))
        Ties(copies={'a': ('bias',)}, tied={'a': 'table'})
    """
    positions = {module: position for position, module in enumerate(model.modules())}
    layers = dict(sorted(layers.items(), key=lambda item: positions[item[1]]))
    baked = {part for layer in layers.values() for part in _parametrizations(layer).modules()}
    holders: dict[int, int] = defaultdict(int)
    for module in model.modules():
        if module not in baked:
            for parameter in module._parameters.values():
                holders[id(parameter)] += parameter is not None
    embeddings: dict[int, str] = {}
    for name, layer in layers.items():
        if reads_indices(layer) and (weight := layer._parameters.get(_weight_name(layer))) is not None:
            embeddings.setdefault(id(weight), name)
    copies: dict[str, tuple[str, ...]] = {}
    tied: dict[str, str] = {}
    for name, layer in layers.items():
        for key, parameter in layer._parameters.items():
            if parameter is None or holders[id(parameter)] < 2:
                continue
            embedding = embeddings.get(id(parameter))
            if key == _weight_name(layer) and embedding is not None:
                if name != embedding:
                    tied[name] = embedding
                continue
            holders[id(parameter)] -= 1
            copies[name] = (*copies.get(name, ()), key)
    return Ties(copies, tied)


def own_parameter(layer: nn.Module, name: str) -> None:
    """Give a layer a copy of its own of one of its parameters.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> a.weight = b.weight
        >>> own_parameter(a, "weight")
        >>> a.weight is b.weight, a.weight.equal(b.weight)
        (False, True)
    """
    parameter = layer._parameters[name]
    assert parameter is not None
    layer._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)


def bake_parametrizations(layer: nn.Module) -> None:
    """Make the parametrized tensors of a layer (weight norm, spectral norm) plain parameters of their present values.

    Example:
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> layer = weight_norm(nn.Linear(2, 2))
        >>> bake_parametrizations(layer)
        >>> type(layer).__name__, [name for name, _ in layer.named_parameters()]
        ('Linear', ['bias', 'weight'])
    """
    for tensor in list(_parametrizations(layer)):
        remove_parametrization(layer, tensor, keep_value=True)
        value = getattr(layer, tensor)
        delattr(layer, tensor)
        layer.register_parameter(tensor, nn.Parameter(value.detach().clone(), requires_grad=False))


def with_baked_parametrizations(layer: nn.Module) -> nn.Module:
    """Make a shallow copy of a layer with plain parameters in place of its parametrized tensors.

    Everything else is shared with the layer, which is not changed. A layer without parametrized tensors is returned
    itself.

    Example:
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> layer = weight_norm(nn.Linear(2, 2))
        >>> copy = with_baked_parametrizations(layer)
        >>> type(copy).__name__, copy.weight.equal(layer.weight), type(layer).__name__
        ('Linear', True, 'ParametrizedLinear')
    """
    if not parametrize.is_parametrized(layer):
        return layer
    # Parametrizing gave the layer a class of its own, below the user's.
    cls = type(layer).__mro__[1]
    copy: nn.Module = object.__new__(cls)
    copy.__dict__.update(layer.__dict__)
    copy._parameters = dict(layer._parameters)
    copy._modules = {name: module for name, module in layer._modules.items() if name != "parametrizations"}
    for tensor in _parametrizations(layer):
        copy.register_parameter(tensor, nn.Parameter(getattr(layer, tensor).detach().clone(), requires_grad=False))
    return copy


def remove_parametrization(layer: nn.Module, tensor: str, keep_value: bool) -> None:
    """Do what ``parametrize.remove_parametrizations`` does, to this layer alone.

    Args:
        layer: The layer.
        tensor: Name of the parametrized tensor.
        keep_value: Whether the tensor keeps its parametrized value, or becomes again the original that it was computed
            from.

    Example:
        >>> import copy
        >>> layer = nn.Linear(2, 2)
        >>> _ = parametrize.register_parametrization(layer, "weight", nn.Tanh())
        >>> other = copy.deepcopy(layer)
        >>> remove_parametrization(layer, "weight", keep_value=False)
        >>> parametrize.is_parametrized(layer), parametrize.is_parametrized(other)
        (False, True)
    """
    # A deep copy shares its class with the original, and removing changes the class.
    cls = type(layer)
    layer.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    parametrize.remove_parametrizations(layer, tensor, leave_parametrized=keep_value)


def share_parametrization(layer: nn.Module, owner: nn.Module, name: str) -> None:
    """Let a layer that shares its weight with ``owner``, whose weight is parametrized, share the parametrization.

    Args:
        layer: The layer.
        owner: The layer that owns the weight; of a registered type.
        name: Name of the weight in ``layer``; that in ``owner`` is known from its type.

    Example:
        >>> table, layer = nn.Embedding(3, 2), nn.Linear(2, 3)
        >>> layer.weight = table.weight
        >>> _ = parametrize.register_parametrization(table, "weight", nn.Tanh())
        >>> share_parametrization(layer, table, "weight")
        >>> layer.weight.equal(table.weight) and layer.parametrizations.weight is table.parametrizations.weight
        True
        >>> stop_sharing_parametrization(layer, "weight")
        >>> layer.weight is table.parametrizations.weight.original
        True
    """
    parametrize.register_parametrization(layer, name, nn.Identity())
    layer.parametrizations[name] = owner.parametrizations[_weight_name(owner)]  # type: ignore[index, operator]


def stop_sharing_parametrization(layer: nn.Module, name: str) -> None:
    """Undo ``share_parametrization``, which has an example: the layer again shares the plain weight.

    Args:
        layer: The layer.
        name: Name of its weight.
    """
    original = layer.parametrizations[name].original  # type: ignore[index, union-attr]
    del layer.parametrizations
    layer.__class__ = type(layer).__mro__[1]
    layer.register_parameter(name, original)


def _parametrizations(layer: nn.Module) -> nn.ModuleDict:
    """Parametrizations of a layer by tensor; empty if it has none."""
    found = getattr(layer, "parametrizations", None)
    return found if isinstance(found, nn.ModuleDict) else nn.ModuleDict()


def _weight_name(layer: nn.Module) -> str:
    """Name of a layer's weight; ``""``, which no parameter has, if it has none."""
    layer_type = layer_type_of(layer)
    return "" if layer_type is None or layer_type.weight is None else layer_type.weight
