"""Layers that must agree on their bit-widths, observed in the model's structure or named by the user."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ..network.dataflow import layers_feeding_an_add, layers_sharing_an_input
from ..network.network import QuantizedNetwork


def sharing_a_weight(network: QuantizedNetwork) -> list[list[str]]:
    """Group the layers that are tied to one weight, with the one that owns it.

    Example:
        See ``sharing_an_input``, whose signature it shares.
    """
    groups: dict[str, list[str]] = {}
    for name, layer in network.layers.items():
        if layer.tied_to is not None:
            groups.setdefault(layer.tied_to.name, [layer.tied_to.name]).append(name)
    return list(groups.values())


def sharing_an_input(network: QuantizedNetwork) -> list[list[str]]:
    """Group the quantized layers that read the very same tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> class Gate(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.gate, self.down = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.down(self.up(x) * self.gate(x))
        >>> model = Gate().eval()
        >>> network = QuantizedNetwork(model, QuantizationScheme())
        >>> network.prepare(lambda: model(torch.ones(1, 2)))
        >>> sharing_an_input(network), feeding_an_add(network), named_groups(network, [["up", "d*"]])
        ([['up', 'gate']], [], [['up', 'down']])
    """
    assert network.structure is not None
    return layers_sharing_an_input(network.structure, list(network.layers))


def feeding_an_add(network: QuantizedNetwork) -> list[list[str]]:
    """Group the quantized layers whose outputs are added up: directly, or after operators with a single tensor as their
    input (normalizations, activations, views) in between.

    Example:
        See ``sharing_an_input``, whose signature it shares.
    """
    assert network.structure is not None
    return layers_feeding_an_add(network.structure, list(network.layers))


def named_groups(network: QuantizedNetwork, groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """List the layers that each of the user's groups stands for.

    Args:
        network: Network that has been prepared.
        groups: Lists of names and patterns.

    Raises:
        ValueError: If a group is no list, or one of its entries matches no quantized layer.

    Example:
        See ``sharing_an_input``.
    """
    found = []
    for group in groups:
        if isinstance(group, str):
            raise ValueError(
                f"groups must be lists of names or patterns, got {group!r}: write [[{group!r}, ...], ...]."
            )
        for pattern in group:
            if not any(fnmatchcase(name, pattern) for name in network.layers):
                raise ValueError(
                    f"groups: {pattern!r} matches no quantized layer; these are: {', '.join(network.layers)}."
                )
        found.append([name for name in network.layers if any(fnmatchcase(name, pattern) for pattern in group)])
    return found
