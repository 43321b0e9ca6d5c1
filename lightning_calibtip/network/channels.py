"""Channels of a layer's first input, and the weights that each is multiplied with."""

from dataclasses import replace

from torch import Tensor, nn

from ..quantization.spec import Channels, LayerConfig
from .layer_types import LayerType


def channel_count(module: nn.Module, layer_type: LayerType, weight: Tensor) -> int:
    """Number of channels of the first input of a layer whose type has an ``input_axis``.

    Args:
        module: The layer.
        layer_type: Its type.
        weight: Its weight.

    Example:
        >>> from lightning_calibtip.network.layer_types import layer_type_of
        >>> conv, transposed = nn.Conv2d(6, 4, 1, groups=2), nn.ConvTranspose2d(6, 4, 1, groups=2)
        >>> [channel_count(module, layer_type_of(module), module.weight) for module in (conv, transposed)]
        [6, 6]
    """
    axis = layer_type.input_axis
    assert axis is not None
    return int(weight.shape[axis]) * (groups_of(module) if axis != 0 else 1)


def with_equalization(config: LayerConfig, layer_type: LayerType, channels: Channels | None) -> LayerConfig:
    """The format of a layer whose first input has its channels equalized, and with them those of the other operand of a
    product.

    Args:
        config: Format of the layer, with a quantized first input.
        layer_type: Its type.
        channels: Channels of the first input; None to end the equalization.

    Example:
        >>> from lightning_calibtip.network.layer_types import LayerType, Operand
        >>> from lightning_calibtip.quantization.spec import TensorSpec
        >>> product = LayerType(None, None, (Operand(channel_axis=-1), Operand(channel_axis=-2)))
        >>> config = with_equalization(LayerConfig(None, (TensorSpec(8),) * 2), product, Channels(-1, 64))
        >>> config.inputs[1].equalized
        Channels(axis=-2, count=64, inverse=True)
    """
    first, *others = config.inputs
    assert first is not None
    inputs = [replace(first, equalized=channels), *others]
    if layer_type.is_product and others[0] is not None:
        axis = layer_type.operands[1].channel_axis
        assert axis is not None
        other = None if channels is None else Channels(axis, channels.count, inverse=True)
        inputs[1] = replace(others[0], equalized=other)
    return replace(config, inputs=tuple(inputs))


def along_weight(factors: Tensor, module: nn.Module, layer_type: LayerType, weight: Tensor) -> Tensor:
    """View factors of a layer's input channels so that they broadcast along the weight.

    Args:
        factors: One for each channel.
        module: The layer.
        layer_type: Its type, which has an ``input_axis``.
        weight: Its weight.

    Example:
        >>> import torch
        >>> from lightning_calibtip.network.layer_types import layer_type_of
        >>> grouped = nn.Conv1d(4, 2, 1, groups=2)
        >>> along_weight(torch.arange(4.0), grouped, layer_type_of(grouped), grouped.weight).flatten(1)
        tensor([[0., 1.],
                [2., 3.]])
    """
    axis, groups = layer_type.input_axis, groups_of(module)
    if axis == 0 or groups == 1:
        return factors.view([-1 if dim == axis else 1 for dim in range(weight.dim())])
    # Each group of output channels has weights for input channels of its own.
    of_outputs = factors.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return of_outputs.view([*of_outputs.shape, *[1] * (weight.dim() - 2)])


def is_free(module: nn.Module, layer_type: LayerType, weight: Tensor) -> bool:
    """Whether every output channel reads one input channel alone, so that the scales of the weight's channels can take
    any ratios (a depthwise convolution).

    Args:
        module: The layer.
        layer_type: Its type, which has an ``input_axis``.
        weight: Its weight.

    Example:
        >>> from lightning_calibtip.network.layer_types import layer_type_of
        >>> depthwise = nn.Conv2d(4, 8, 3, groups=4)
        >>> is_free(depthwise, layer_type_of(depthwise), depthwise.weight)
        True
    """
    axis, groups = layer_type.input_axis, groups_of(module)
    return bool(axis) and groups > 1 and weight.shape[axis or 0] == 1


def groups_of(module: nn.Module) -> int:
    """Number of groups of a layer's channels, each of which its outputs read apart from the others.

    Example:
        >>> groups_of(nn.Conv1d(4, 2, 1, groups=2)), groups_of(nn.Linear(4, 2))
        (2, 1)
    """
    groups = getattr(module, "groups", 1)
    return groups if isinstance(groups, int) else 1
