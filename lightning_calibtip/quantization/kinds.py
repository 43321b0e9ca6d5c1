"""Which modules can be quantized, and what the engine must know of each type."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Operand:
    """An input of a layer that is quantized.

    Args:
        contracted: Dimensions that the layer sums over for one element of its output, counted from the last. A range of
            its own for each token (``per_token``) spans these. Empty if tokens are among them: such an operand always
            has one range.
        token_axes: Dimensions that run over tokens, where padding is; they count only where the input has at least
            three dimensions.
        unsigned: Whether it is never negative (probabilities): its zero point is and stays that of zero.
    """

    contracted: tuple[int, ...] = (-1,)
    token_axes: tuple[int, ...] = (1,)
    unsigned: bool = False


@dataclass(frozen=True)
class LayerKind:
    """What the engine must know of a layer type.

    Args:
        channel_axis: Output-channel dimension of ``weight``; None if it has no weight.
        operands: The floating-point inputs that are quantized, from the first on; none for an embedding, whose input is
            indices.
        output_token_axes: Dimensions of the output that run over tokens.
    """

    channel_axis: int | None = 0
    operands: tuple[Operand, ...] = (Operand(),)
    output_token_axes: tuple[int, ...] = (1,)


MOST_OPERANDS = 2

_KINDS: dict[type[nn.Module], LayerKind] = {}


def register_layer(
    layer_type: type[nn.Module],
    channel_axis: int | None = 0,
    operands: Sequence[Operand] = (Operand(),),
    output_token_axes: Sequence[int] = (1,),
) -> None:
    """Make a layer type, and its subclasses, quantizable.

    The type must compute its output from its floating-point inputs and, if it has one, a parameter named ``weight``.

    Args:
        layer_type: Class of the layer.
        channel_axis: Output-channel dimension of its ``weight``; None if it has no weight (a matrix product).
        operands: How each of its first inputs is quantized; empty if none is.
        output_token_axes: Dimensions of its output that run over tokens.

    Raises:
        ValueError: If neither a weight nor an input would be quantized, or more than two inputs.

    Example:
        >>> import torch
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(4, 1))
        ...     def forward(self, x):
        ...         return x * self.weight[:, 0]
        >>> register_layer(Scale, channel_axis=0)
        >>> layer_kind(Scale()).channel_axis
        0
    """
    if channel_axis is None and not operands:
        raise ValueError(f"{layer_type.__name__} has neither a weight nor an operand to quantize.")
    if len(operands) > MOST_OPERANDS:
        raise ValueError(
            f"{layer_type.__name__} has {len(operands)} operands; at most {MOST_OPERANDS} can be quantized."
        )
    _KINDS[layer_type] = LayerKind(channel_axis, tuple(operands), tuple(output_token_axes))


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Kind of the nearest registered class that ``module`` is an instance of, or None."""
    return next((_KINDS[cls] for cls in type(module).__mro__ if cls in _KINDS), None)


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a registered type by their full names, in the order of registration."""
    return {name: module for name, module in model.named_modules() if layer_kind(module) is not None}


def reads_indices(module: nn.Module) -> bool:
    """Whether a layer has a weight but no input to quantize: an embedding."""
    kind = layer_kind(module)
    return kind is not None and not kind.operands


_CONVOLUTIONS = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))

for _dimensions, (_conv, _transposed) in enumerate(_CONVOLUTIONS, start=1):
    # Channels and all positions: a range for each sample.
    _input = Operand(tuple(range(-_dimensions - 1, 0)), (2,) if _dimensions == 1 else ())
    register_layer(_conv, 0, [_input], _input.token_axes)
    register_layer(_transposed, 1, [_input], _input.token_axes)
register_layer(nn.Linear)
register_layer(nn.Embedding, 0, operands=())
