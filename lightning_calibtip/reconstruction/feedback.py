"""Second-order rounding of the weights of a unit, from the products of what its layers read."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..network.layers import QuantizedLayer
from ..quantization.feedback import round_with_feedback
from ..quantization.quantizers import AffineQuantizer
from .rounding import Rounding, register_rounding
from .unit_data import MiniBatch
from .units import Unit

FEEDBACK = "feedback"

# Positions of a mini-batch that are looked at, evenly spread: neighbours tell the same.
_POSITIONS = 4096

_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d, torch.addmm)


@register_rounding(FEEDBACK)
class Feedback(Rounding):
    """Rounds by error feedback before the first step (GPTQ: Frantar et al. 2023); the weight then stays as it is, with
    its scales, and biases and the ranges of activations learn.

    Example:
        See ``register_rounding``.
    """

    learns_weight = False
    start = FEEDBACK

    @classmethod
    def check(cls, layer: QuantizedLayer) -> None:
        """See ``Rounding``."""
        check_feedback(layer)


def check_feedback(layer: QuantizedLayer) -> None:
    """Refuse a layer whose weight is not rounded by error feedback.

    Args:
        layer: Layer with a quantized weight of its own.

    Raises:
        ValueError: If its quantizer is of another kind than affine; the message names the layer.

    Example:
        See ``round_unit``.
    """
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, AffineQuantizer) or not quantizer.acts_as_stored:
        raise ValueError(
            f"{layer.name}: rounding with feedback needs an affine quantizer of the weight, got "
            f'{type(quantizer).__name__}; use start="nearest" and rounding="straight_through".'
        )


@torch.no_grad()
def round_unit(unit: Unit, batches: Callable[[], Iterable[MiniBatch]]) -> None:
    """Round the weights of a unit's layers with error feedback, one layer after the other, each on what it reads while
    those before it are rounded already.

    Each latent weight becomes what it was just before it was rounded, so that rounding it to nearest gives the result.
    Layers whose product is not seen (it is none of ``linear`` and ``conv``, or is transposed) stay as they are.

    Args:
        unit: Calibrated unit, quantization on.
        batches: Gives the inputs, and which of their tokens count; asked once for each layer.

    Example:
        See ``adaquant``, whose option ``start="feedback"`` leads here.
    """
    for layer in unit.layers:
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, AffineQuantizer):
            continue
        groups = getattr(layer.module, "groups", 1)
        gram = _gram(unit, layer, batches())
        if gram is None:
            continue
        weight = layer.weight
        scale, zero_point = (_rows(each, layer, groups) for each in quantizer.elementwise(weight.shape))
        spec = quantizer.spec
        moved = round_with_feedback(_rows(weight, layer, groups), gram, scale, zero_point, spec.qmin, spec.qmax)
        by_channel = weight.movedim(layer.channel_axis, 0)
        weight.copy_(moved.reshape(by_channel.shape).movedim(0, layer.channel_axis))


def _rows(weight: Tensor, layer: QuantizedLayer, groups: int) -> Tensor:
    """A weight, or a tensor of its shape, as (groups, output channels of a group, inputs of one)."""
    by_channel = weight.detach().movedim(layer.channel_axis, 0).flatten(1)
    return by_channel.reshape(groups, -1, by_channel.shape[1])


def _gram(unit: Unit, layer: QuantizedLayer, batches: Iterable[MiniBatch]) -> Tensor | None:
    """Sum of the products of what a layer's output channels read, shape (groups, inputs, inputs)."""
    products = _Products(layer)
    with products.watching():
        for batch in batches:
            products.counts = batch.importance
            unit(batch.call)
    return products.gram


class _Products(TorchFunctionMode):
    """Sees the inputs that a layer multiplies with its weight, whatever its ``forward`` does to them before."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer
        self.gram: Tensor | None = None
        self.counts: list[Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the layer's products are added up."""
        module = self.layer.module
        hooks = [
            module.register_forward_pre_hook(lambda *_: self.__enter__() and None),
            module.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _PRODUCTS:
            x, weight = args[1:3] if function is torch.addmm else args[:2]
            if weight.shape == self.layer.weight.shape:
                with torch._C.DisableTorchFunction():
                    self._add(function, x.detach().float(), args, kwargs)
        return function(*args, **kwargs)

    def _add(self, function: Any, x: Tensor, args: Any, kwargs: Any) -> None:
        shape = self.layer.weight.shape
        if function in (F.linear, torch.addmm):
            groups, read = 1, x.reshape(-1, x.shape[-1]).unsqueeze(0)
            for weight in self.counts or ():
                if weight.dim() == x.dim() and weight.shape[:-1] == x.shape[:-1]:
                    read = read[:, (weight > 0).any(-1).reshape(-1)]
        else:
            # The convolution with kernels that pick one input each, whatever the padding.
            groups = self.layer.module.groups if isinstance(self.layer.module.groups, int) else 1
            size = shape[1:].numel()
            picks = torch.eye(size, device=x.device).view(size, *shape[1:]).repeat(groups, *[1] * (len(shape) - 1))
            seen = function(x, picks, None, *args[3:], **{key: kwargs[key] for key in kwargs if key != "bias"})
            seen = seen.movedim(1, -1).reshape(-1, groups, size)
            read = seen.transpose(0, 1)
        step = max(1, read.shape[1] // _POSITIONS)
        read = read[:, ::step].double() if read.device.type != "mps" else read[:, ::step]
        gram = step * (read.mT @ read)
        self.gram = gram if self.gram is None else self.gram + gram
