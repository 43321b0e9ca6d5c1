"""Protection of nodes with many neighbours while ranges are chosen and layers reconstructed (Degree-Quant: Tailor,
Fernandez-Marques, Lane 2021, section 4.1): what is aggregated grows with a node's in-degree, and a few hubs would set
the range of all."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization.protection import Protection
from .edges import Edges, edges_of
from .layers import QuantizedLayer
from .message_passing import Messages, message_passing_layers


def protection_probabilities(in_degrees: Tensor, protection: Protection) -> Tensor:
    """Probability of each node to be protected: ``low + (high - low) * rank / n``, where the rank of a node is the
    number of nodes with at most its in-degree, and n the number of all.

    Args:
        in_degrees: Int64, shape (nodes,).
        protection: The lowest and the highest probability.

    Returns:
        Float32, shape (nodes,).

    Example:
        >>> protection_probabilities(torch.tensor([1, 5, 2, 2]), Protection(low=0.0, high=0.2))
        tensor([0.0500, 0.2000, 0.1500, 0.1500])
    """
    ranks = torch.bincount(in_degrees).cumsum(0)[in_degrees] if len(in_degrees) else in_degrees
    return protection.low + (protection.high - protection.low) * ranks / max(len(in_degrees), 1)


@contextmanager
def protecting(
    model: nn.Module, layers: Sequence[QuantizedLayer], protection: Protection, generator: torch.Generator
) -> Iterator[None]:
    """Inside, some nodes of each graph that layers of message passing get are protected, drawn anew at each call: what
    they send and what is aggregated for them is neither observed nor quantized.

    Args:
        model: The model, or a part of it.
        layers: Quantized layers in it.
        protection: The probabilities; nothing is done where none is above 0.
        generator: Random generator, on the CPU.

    Example:
        See ``protection_probabilities``, of which the nodes are drawn.
    """
    owners = message_passing_layers(model) if protection else {}

    def draw(layer: Any, inputs: Any) -> None:
        edges = edges_of(layer)
        if edges is not None:
            edges.protected = _draw(edges, protection, generator)

    def keep(module: Messages) -> Callable[[Any, tuple[Tensor], Tensor], Tensor]:
        def hook(quantizer: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
            (x,) = args
            rows = module.protected_rows(len(x)) if x.dim() else None
            if rows is None:
                return output
            return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), quantizer.unrounded(x), output)

        return hook

    with ExitStack() as stack:
        for owner in owners.values():
            # After the hook that notes the edges.
            stack.callback(owner.register_propagate_forward_pre_hook(draw).remove)
        for layer in layers if owners else ():
            if isinstance(layer.module, Messages):
                for quantizer in filter(None, layer.input_quantizers):
                    stack.callback(quantizer.register_forward_hook(keep(layer.module)).remove)
        yield


def _draw(edges: Edges, protection: Protection, generator: torch.Generator) -> Tensor:
    degrees = edges.in_degrees()
    draws = torch.rand(len(degrees), generator=generator).to(degrees.device)
    return draws < protection_probabilities(degrees, protection)


def require_nodes(layers: Sequence[QuantizedLayer], protection: Protection, name: str) -> None:
    """Refuse a protection of nodes where no quantized layer passes messages between nodes.

    Args:
        layers: Quantized layers of a model.
        protection: The probabilities.
        name: Name of the stage, for the message.

    Raises:
        ValueError: If there is nothing to protect.

    Example:
        >>> require_nodes([], Protection(high=0.1), "Calibration")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: Calibration: protection_high=0.1 protects nodes of graphs, and no quantized ...: leave it at 0.
    """
    if protection and not any(isinstance(layer.module, Messages) for layer in layers):
        raise ValueError(
            f"{name}: protection_high={protection.high} protects nodes of graphs, and no quantized layer of the model "
            "passes messages between nodes: leave it at 0."
        )
