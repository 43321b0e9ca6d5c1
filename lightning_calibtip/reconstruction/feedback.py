"""Second-order rounding of the weights of a unit, from the products of what its layers read."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..network.channels import groups_of
from ..network.layers import QuantizedLayer
from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.feedback import round_with_feedback
from .rounding import Rounding, register_rounding
from .unit_data import MiniBatch
from .units import Unit

FEEDBACK = "feedback"

# Positions of a mini-batch that are looked at, chosen at random: neighbours tell the same.
_POSITIONS = 4096

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# Arguments of the products, and which of them are the input and the weight.
_NAMES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv1d: _CONVOLUTION,
    F.conv2d: _CONVOLUTION,
    F.conv3d: _CONVOLUTION,
    torch.addmm: ("input", "mat1", "mat2"),
}
_OPERANDS = {function: ("mat1", "mat2") if function is torch.addmm else ("input", "weight") for function in _NAMES}


@register_rounding(FEEDBACK)
class Feedback(Rounding):
    """Rounds by error feedback before the first step (GPTQ: Frantar et al. 2023); the weight then stays as it is, with
    its scales, and biases and the ranges of activations learn.

    Example:
        See ``register_rounding``.
    """

    learns_scales = False
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
        groups = groups_of(layer.module)
        gram = _gram(unit, layer, batches())
        if gram is None:
            continue
        weight, spec = layer.weight, quantizer.spec
        rows, scale, zero_point = (
            _rows(each, layer, groups).to(gram.device) for each in (weight, *quantizer.elementwise(weight.shape))
        )
        moved = round_with_feedback(rows, gram, scale, zero_point, spec.qmin, spec.qmax)
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
        for number, batch in enumerate(batches):
            products.counts = batch.importance
            # What follows a layer that runs once need not be computed.
            products.stops = number > 0 and products.runs == 1
            with suppress(_ReachedLayer):
                unit(batch.call)
    return products.gram


class _ReachedLayer(BaseException):
    """Ends a pass; not an ``Exception``, so that no ``except`` clause of the user's model holds it back."""


class _Products(TorchFunctionMode):
    """Sees the inputs that a layer multiplies with its weight, whatever its ``forward`` does to them before."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer
        self.gram: Tensor | None = None
        self.counts: list[Tensor] | None = None
        # How often the layer ran in the first batch, and whether later passes end behind it.
        self.runs, self.stops = 0, False
        self._generator = torch.Generator().manual_seed(0)
        self._entered = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the layer's products are added up."""
        module = self.layer.module

        def enter(*_: Any) -> None:
            self.__enter__()
            self._entered += 1
            self.runs += not self.stops

        def leave(*_: Any) -> None:
            # It is called as well where another hook has raised before this one's turn.
            if self._entered:
                self._entered -= 1
                self.__exit__(None, None, None)

        def stop(*_: Any) -> None:
            if self.stops:
                raise _ReachedLayer

        hooks = [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
            # Not called after an error, which must not be taken for the end of a pass.
            module.register_forward_hook(stop),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _NAMES:
            given = {**dict(zip(_NAMES[function], args, strict=False)), **kwargs}
            x, weight = (given.get(name) for name in _OPERANDS[function])
            if isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.shape == self.layer.weight.shape:
                with torch._C.DisableTorchFunction():
                    self._add(self._read(x.detach().float(), given))
        return function(*args, **kwargs)

    def _read(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        """What output channels read, shape (groups, positions, inputs)."""
        if "stride" in given or self.layer.weight.dim() > 2:
            return _patches(x, self.layer.weight.shape, given)
        rows = x.reshape(-1, x.shape[-1])
        for weight in self.counts or ():
            if weight.dim() == x.dim() and weight.shape[:-1] == x.shape[:-1]:
                rows = rows[(weight > 0).any(-1).reshape(-1)]
                break
        return rows.unsqueeze(0)

    def _add(self, read: Tensor) -> None:
        count = read.shape[1]
        if count > _POSITIONS:
            chosen = torch.randperm(count, generator=self._generator)[:_POSITIONS]
            read = read[:, chosen.to(read.device)]
        # MPS has no float64.
        read = (read.cpu() if read.device.type == "mps" else read).double()
        gram = count / max(read.shape[1], 1) * (read.mT @ read)
        self.gram = gram if self.gram is None else self.gram + gram


def _patches(x: Tensor, shape: Sequence[int], given: dict[str, Any]) -> Tensor:
    """What the output channels of a convolution read at each position, shape (groups, positions, inputs)."""
    dims, groups = len(shape) - 2, given.get("groups", 1)
    padding, moves = given.get("padding", 0), (given.get("stride", 1), given.get("dilation", 1))
    stride, dilation = ([each] * dims if isinstance(each, int) else list(each) for each in moves)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    sizes = list(shape[2:])
    if isinstance(padding, str):
        totals = [step * (size - 1) if padding == "same" else 0 for size, step in zip(sizes, dilation, strict=True)]
        ends = [(total // 2, total - total // 2) for total in totals]
    else:
        ends = [(each, each) for each in ([padding] * dims if isinstance(padding, int) else padding)]
    x = F.pad(x, [amount for pair in reversed(ends) for amount in pair])
    for dim, (size, step, move) in enumerate(zip(sizes, dilation, stride, strict=True)):
        # A window of each dimension at a time: its elements come last.
        x = x.unfold(2 + dim, step * (size - 1) + 1, move)[..., ::step]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    # (samples, groups, channels, positions..., elements...) to (groups, samples and positions, channels and elements)
    order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    x = x.permute(order)
    return x.reshape(x.shape[0], x.shape[1 : 2 + dims].numel(), -1)
