"""Hooks on a layer: its inputs and its output go through quantizers, and observers see them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..quantization.affine import decode, encode
from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.quantizers import Quantizer
from ..quantization.spec import LayerConfig
from .routing import not_routed
from .tensors import ObservedTensor

# Names of the quantizers of activations below a layer.
INPUT_QUANTIZERS, OUTPUT_QUANTIZER = "input_quantizers", "output_quantizer"

# Biases are at most so many bits, that sums of products with them fit 32.
_BIAS_BITS = 30


def quantize_inputs(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: the floating-point tensors that the layer is given go through its quantizers, by position.

    Example:
        See ``QuantizedLayer``.
    """
    quantizers: nn.ModuleDict = layer.input_quantizers  # type: ignore[assignment]
    positions = iter(range(len(args) + len(kwargs)))

    def through(value: Any) -> Any:
        if not _is_real(value):
            return value
        key = str(next(positions))
        return quantizers[key](value) if key in quantizers else value

    with not_routed():
        return tuple(map(through, args)), {key: through(value) for key, value in kwargs.items()}


def quantize_output(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: the first floating-point tensor that the layer returns goes through its
    output's quantizer.

    Example:
        See ``QuantizedLayer``.
    """
    waiting: list[nn.Module] = [layer.output_quantizer]  # type: ignore[list-item]

    def through(leaf: Any) -> Any:
        return waiting.pop()(leaf) if waiting and _is_real(leaf) else leaf

    with not_routed():
        return tree_map(through, output)


def round_bias(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: until ``restore_bias``, the layer has a bias that is a whole number of the products' steps.

    Example:
        See ``QuantizedLayer``.
    """
    inputs: Any = layer.input_quantizers
    # It is still there if a forward pass was broken off.
    bias = layer.__dict__.get("_latent_bias", layer._parameters.get("bias"))
    place: Any = next(iter(inputs.values()), None)
    quantizer = _affine(place)
    weights = _affine(next(iter(layer.parametrizations.values()))[0])  # type: ignore[operator]
    if bias is None or quantizer is None or weights is None or (place is quantizer and not quantizer.enabled):
        return
    with not_routed():
        rounded = products_grid(bias.detach(), quantizer, weights)
    layer.__dict__["_latent_bias"] = bias
    # Straight through: the latent bias learns.
    layer._parameters["bias"] = bias + (rounded - bias.detach())


def _affine(place: Any) -> AffineQuantizer | None:
    """The affine quantizer in a place of a layer, or the one that something else there stands for."""
    found = getattr(place, "at_work", place)
    return found if isinstance(found, AffineQuantizer) else None


def restore_bias(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: give the layer its latent bias back.

    Example:
        See ``QuantizedLayer``.
    """
    if "_latent_bias" in layer.__dict__:
        layer._parameters["bias"] = layer.__dict__.pop("_latent_bias")


def products_grid(bias: Tensor, input_quantizer: AffineQuantizer, weight_quantizer: AffineQuantizer) -> Tensor:
    """Round a bias to whole numbers of the products' steps, float32.

    Args:
        bias: Shape (channels,).
        input_quantizer: Quantizer of the layer's input, with one scale.
        weight_quantizer: Quantizer of its weight, with one scale or one for each channel.

    Example:
        >>> from lightning_calibtip.quantization.spec import TensorSpec
        >>> half = AffineQuantizer("x", TensorSpec(), rows=1)
        >>> _ = half.scale.data.fill_(0.5)
        >>> products_grid(torch.tensor([0.6, -0.3]), half, half)
        tensor([ 0.5000, -0.2500])
    """
    scale = (input_quantizer.scale * weight_quantizer.scale).detach().expand(bias.shape)
    zero = scale.new_zeros(scale.shape)
    limits = -float("inf"), float("inf")
    return decode(encode(bias, scale, zero, *limits, axis=0), scale, zero, *limits, axis=0).to(bias.dtype)


@torch.no_grad()
def make_room_for_bias(
    config: LayerConfig,
    bias: Tensor | None,
    input_quantizers: Sequence[Quantizer | None],
    weight_quantizer: Quantizer | None,
) -> None:
    """Raise the scales of weights so far that no bias is more than 2^30 steps of the products, and fits 32 bits.

    It concerns channels whose weights are next to nothing beside their bias (dead ones, after a BatchNorm was folded).

    Args:
        config: Format of the layer; nothing is done without an integer bias.
        bias: Shape (channels,); None if there is none.
        input_quantizers: Quantizer of the layer's input, with one scale.
        weight_quantizer: Quantizer of its weight, with one scale or one for each channel; None for a shared weight.

    Example:
        >>> from lightning_calibtip.quantization.spec import TensorSpec
        >>> small, one = (AffineQuantizer(name, TensorSpec(symmetric=True), rows=1) for name in ("w", "x"))
        >>> _ = small.scale.data.fill_(1e-12)
        >>> make_room_for_bias(LayerConfig(integer_bias=True), torch.tensor([2.0**10]), [one], small)
        >>> small.scale.item() == 2.0**-20
        True
    """
    if not config.integer_bias or bias is None:
        return
    (input_quantizer,) = input_quantizers
    if not isinstance(input_quantizer, AffineQuantizer) or not isinstance(weight_quantizer, AffineQuantizer):
        return
    reach = bias.detach().abs().float() if weight_quantizer.rows > 1 else bias.detach().abs().float().amax(0, True)
    smallest = reach / (input_quantizer.scale * 2.0**_BIAS_BITS)
    weight_quantizer.scale.copy_(torch.maximum(weight_quantizer.scale, smallest))


@contextmanager
def observing_activations(
    layer: nn.Module, inputs: Sequence[ObservedTensor | None], output: ObservedTensor, tokens: Tensor | None
) -> Iterator[None]:
    """Inside, the observers of a layer's activations see what passes, as the model gives it.

    Args:
        layer: The layer.
        inputs: The activations that it reads, by position among its floating-point inputs; None for one that another
            layer shows to the observer.
        output: The activation that it writes.
        tokens: Which tokens of the batch count, bool, shape (batch, positions); all if None.

    Example:
        See ``QuantizedNetwork``.
    """

    def see_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with not_routed():
            for tensor, value in zip(inputs, real_inputs(args, kwargs), strict=False):
                if tensor is not None:
                    tensor.observe(value, _counted(module, tokens, value))

    def see_output(module: nn.Module, args: Any, result: Any) -> None:
        if (value := real_output(result)) is not None:
            with not_routed():
                output.observe(value, _counted(module, tokens, value))

    hooks = [
        layer.register_forward_pre_hook(see_inputs, with_kwargs=True, prepend=True),
        layer.register_forward_hook(see_output),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class OwnRows:
    """Base class of modules of which not all tensors have the rows of the batch: they know which of theirs count.

    Example:
        See ``Messages``.
    """

    def counted_rows(self, tokens: Tensor | None, rows: int) -> Tensor | None:
        """Which rows of a tensor that the module reads or writes count.

        Args:
            tokens: Which tokens, or rows, of the batch count; all if None.
            rows: Length of the tensor's first dimension.

        Returns:
            Bool, shape (rows,), or as ``tokens``; None if all count.
        """
        return tokens


def real_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The inputs of a layer that its quantizers and observers count: its floating-point arguments, in order.

    Example:
        >>> len(real_inputs([torch.ones(1), torch.ones(1, dtype=torch.int64)], {"mask": None}))
        1
    """
    return [value for value in (*args, *kwargs.values()) if _is_real(value)]


def real_output(output: Any) -> Tensor | None:
    """The output of a layer that its quantizer and observer count: the first floating-point tensor; None without one.

    Example:
        >>> real_output((None, torch.ones(1)))
        tensor([1.])
    """
    return next(filter(_is_real, tree_leaves(output)), None)


def _counted(module: nn.Module, tokens: Tensor | None, value: Tensor) -> Tensor | None:
    return module.counted_rows(tokens, len(value)) if isinstance(module, OwnRows) and value.dim() else tokens


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
