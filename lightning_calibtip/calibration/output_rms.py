"""Root mean square of the outputs of layers: the unit in which steps of their biases are measured."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..network.layers import QuantizedLayer
from ..quantization.tokens import token_mask


@torch.no_grad()
def output_rms(
    layers: Iterable[QuantizedLayer], run: Callable[[], Any], tokens: Tensor | None = None
) -> dict[str, float]:
    """Root mean square of each layer's output, by layer name; layers that do not run are missing.

    Args:
        layers: Layers to measure.
        run: Function that runs them on one batch.
        tokens: Which tokens of the batch count, bool, shape (batch, positions); all if None.

    Example:
        >>> from lightning_calibtip.network.network import QuantizedNetwork
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 2)).eval()
        >>> network = QuantizedNetwork(model, QuantizationScheme())
        >>> network.prepare(lambda: model(torch.ones(1, 2)))
        >>> list(output_rms(network.layers.values(), lambda: model(torch.ones(1, 2))))
        ['0']
    """
    found: dict[str, float] = {}

    def note(layer: QuantizedLayer) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leaves = [leaf.float() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            masks = [token_mask(leaf.shape, tokens, layer.type.output_token_axes) for leaf in leaves]
            pairs = zip(leaves, masks, strict=True)
            leaves = [leaf if mask is None else leaf[mask.expand(leaf.shape)] for leaf, mask in pairs]
            squares, count = sum(float(leaf.square().sum()) for leaf in leaves), sum(leaf.numel() for leaf in leaves)
            found[layer.name] = (squares / max(count, 1)) ** 0.5

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(note(layer)).remove)
        run()
    return found
