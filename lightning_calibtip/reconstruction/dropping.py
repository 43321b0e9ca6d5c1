"""Random dropping of the quantization of activations during optimisation (QDrop: Wei et al. 2022)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..calibration.recording import UnitCall
from ..network.layers import QuantizedLayer


class Dropping:
    """Random choice between two values of a tensor, element by element.

    Args:
        probability: Probability of the first (the float) value, 0 to 1.
        generator: Random generator that seeds the draws.

    Example:
        >>> drops = Dropping(1.0, torch.Generator())
        >>> drops.choose(torch.tensor([0.3]), torch.tensor([0.5]))
        tensor([0.3000])
    """

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        self.probability = probability
        self._seed = int(torch.randint(2**62, (), generator=generator))
        self._generators: dict[torch.device, torch.Generator] = {}

    def choose(self, exact: Tensor, quantized: Tensor) -> Tensor:
        """Elements of ``exact`` with the given probability, else of ``quantized``."""
        device = exact.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        draw = torch.rand(exact.shape, generator=self._generators[device], device=device)
        return torch.where(draw < self.probability, exact, quantized)

    def mix(self, call: UnitCall, float_call: UnitCall | None) -> UnitCall:
        """Arguments whose floating-point tensors are drawn from both calls."""
        if float_call is None:
            return call

        def choose(exact: Any, quantized: Any) -> Any:
            real = isinstance(exact, Tensor) and exact.is_floating_point() and exact.layout == torch.strided
            return self.choose(exact, quantized) if real else quantized

        mixed: UnitCall = tree_map(choose, float_call, call)
        return mixed


@contextmanager
def dropping(layers: Sequence[QuantizedLayer], drops: Dropping) -> Iterator[None]:
    """Inside, the activations of the layers are quantized only in part. See ``Dropping``.

    Args:
        layers: Layers of a unit.
        drops: Random choice of the parts.
    """

    def hook(quantizer: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        return drops.choose(quantizer.unrounded(args[0]), output)

    # Layers that read the same tensor share its quantizer, which must be hooked once.
    quantizers = {q: None for layer in layers for q in (*layer.input_quantizers, layer.output_quantizer) if q}
    with ExitStack() as stack:
        for quantizer in quantizers if drops.probability else ():
            stack.callback(quantizer.register_forward_hook(hook).remove)
        yield
