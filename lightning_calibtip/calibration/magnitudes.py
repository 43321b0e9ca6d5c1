"""How large the outputs of layers are: the yardstick for steps of their biases."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..quantization.layers import QuantizedLayer


@torch.no_grad()
def output_magnitudes(layers: Iterable[QuantizedLayer], run: Callable[[], Any]) -> dict[str, float]:
    """Root mean square of each layer's output, by layer name, in what ``run`` runs; layers that do not run are
    missing."""
    found: dict[str, float] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leaves = [leaf.float() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            squares, count = sum(float(leaf.square().sum()) for leaf in leaves), sum(leaf.numel() for leaf in leaves)
            found[name] = (squares / max(count, 1)) ** 0.5

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(note(layer.name)).remove)
        run()
    return found
