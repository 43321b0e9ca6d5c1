"""The registry of quantizable layer types, and what has to be known of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Operand:
    """How one floating-point input of a layer type is quantized.

    Args:
        dynamic_range_axes: Dimensions, counted from the last, over which a range spans that is found at run time
            (``per_token``): those that the layer sums over for one element of its output. Empty if tokens are among
            them; such an operand always has one calibrated range.
        token_axes: Dimensions that run over tokens, where padding may be. They count only where the input has at least
            three dimensions.
        nonnegative: Whether the input is never negative (probabilities, say), so that its zero point stays that of
            zero.
        channel_axis: Dimension, counted from the last, whose elements are each multiplied with weights of their own,
            so that a channel may be divided by a factor if its weights are multiplied by it (``Equalization``); None
            if there is none.

    Example:
        >>> Operand(nonnegative=True).nonnegative
        True
    """

    dynamic_range_axes: tuple[int, ...] = (-1,)
    token_axes: tuple[int, ...] = (1,)
    nonnegative: bool = False
    channel_axis: int | None = None


@dataclass(frozen=True)
class LayerType:
    """What has to be known of a layer type to quantize it.

    Args:
        weight: Name of the parameter that is its weight; None if it has none (a matrix product of two inputs).
        channel_axis: Output-channel dimension of the weight; None exactly if there is no weight.
        operands: Its floating-point inputs that are quantized, from the first on; empty for an embedding, whose input
            is indices.
        output_token_axes: Dimensions of its output that run over tokens.
        between_layers: Whether it is an operation between layers (an addition, a pool): only some targets quantize it,
            its bit-width is theirs, and it is no unit of reconstruction by itself.
        adds_bias: Whether its parameter ``bias``, if it has one, is added to its sums of products.
        input_axis: Dimension of the weight that runs over the channels of the first operand (of a group of them, where
            the layer has ``groups``); None if there is none.
        part: Whether it is a weight or an input of the module that holds it, which is the unit of reconstruction.
        in_engines: Whether engines can compute with its tensors quantized; where they cannot, targets refuse it.

    A product of two operands that both name a ``channel_axis`` multiplies and sums channel by channel: one operand's
    channels may be divided by ratios if the other's are multiplied by them.

    Raises:
        ValueError: If only one of ``weight`` and ``channel_axis`` is None.

    Example:
        >>> layer_type_of(nn.Linear(2, 2)).adds_bias
        True
    """

    weight: str | None = "weight"
    channel_axis: int | None = 0
    operands: tuple[Operand, ...] = (Operand(),)
    output_token_axes: tuple[int, ...] = (1,)
    between_layers: bool = False
    adds_bias: bool = False
    input_axis: int | None = None
    part: bool = False
    in_engines: bool = True

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.channel_axis is None):
            raise ValueError(
                f"weight and channel_axis must both be None or neither, got weight={self.weight!r} and "
                f"channel_axis={self.channel_axis!r}."
            )

    @property
    def is_product(self) -> bool:
        """Whether it multiplies the channels of two operands and sums over them."""
        return self.weight is None and [axis.channel_axis is None for axis in self.operands] == [False, False]


# By class, or by the full name of a class that need not have been imported.
_LAYER_TYPES: dict[type[nn.Module] | str, LayerType] = {}


def register_layer(
    layer_type: type[nn.Module] | str,
    channel_axis: int | None = 0,
    operands: Sequence[Operand] = (Operand(),),
    output_token_axes: Sequence[int] = (1,),
    weight: str = "weight",
    between_layers: bool = False,
    adds_bias: bool = False,
    input_axis: int | None = None,
    part: bool = False,
    in_engines: bool = True,
) -> None:
    """Make a layer type, and its subclasses, quantizable.

    The type must compute its output from its floating-point inputs and, if it has one, its weight. Its inputs are
    counted in the order in which they are passed: positional arguments first, then keyword arguments.

    Args:
        layer_type: Class of the layer, or its full name (``"library.nn.linear.Linear"``), by which it is known once
            its library is imported.
        channel_axis: Output-channel dimension of its weight; None if it has no weight (a matrix product).
        operands: How each of its inputs is quantized, from the first on; empty if none is.
        output_token_axes: Dimensions of its output that run over tokens.
        weight: Name of the parameter that is its weight; it does not count if ``channel_axis`` is None.
        between_layers: Whether only targets that ask for it quantize it, see ``LayerType``.
        adds_bias: Whether its parameter ``bias`` is added to its sums of products.
        input_axis: Dimension of its weight that runs over the channels of its first input, whose ``Operand`` says
            which of its dimensions they are; None if the channels cannot be equalized.
        part: Whether it is a weight or an input of the module that holds it, see ``LayerType``.
        in_engines: Whether engines can compute with its tensors quantized, see ``LayerType``.

    Raises:
        ValueError: If neither a weight nor an input would be quantized, or the weight's name cannot be that of a
            parameter.

    Example:
        >>> import torch
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factors = nn.Parameter(torch.ones(4, 1))
        ...     def forward(self, x):
        ...         return x * self.factors[:, 0]
        >>> register_layer(Scale, channel_axis=0, weight="factors")
        >>> layer_type_of(Scale()).weight
        'factors'
    """
    if channel_axis is None and not operands:
        raise ValueError(f"{_name(layer_type)} has neither a weight nor an operand to quantize.")
    if not isinstance(weight, str) or not weight.isidentifier():
        raise ValueError(
            f"{_name(layer_type)}: weight must be the name of the parameter that is its weight, got {weight!r}."
        )
    name = None if channel_axis is None else weight
    axes = tuple(output_token_axes)
    _LAYER_TYPES[layer_type] = LayerType(
        name, channel_axis, tuple(operands), axes, between_layers, adds_bias, input_axis, part, in_engines
    )


def layer_type_of(module: nn.Module) -> LayerType | None:
    """Find the layer type of the nearest registered class that ``module`` is an instance of; None if there is none.

    Example:
        >>> layer_type_of(nn.ConvTranspose2d(1, 2, 3)).channel_axis
        1
        >>> layer_type_of(nn.ReLU()) is None
        True
    """
    keys = (key for cls in type(module).__mro__ for key in (cls, f"{cls.__module__}.{cls.__qualname__}"))
    return next((_LAYER_TYPES[key] for key in keys if key in _LAYER_TYPES), None)


def is_linear(module: nn.Module) -> bool:
    """Whether a module's own class, not one that it is derived from, is registered as one that computes
    ``torch.nn.functional.linear`` of its input, weight and bias.

    Example:
        >>> is_linear(nn.Linear(2, 2)), is_linear(nn.Conv1d(2, 2, 1))
        (True, False)
    """
    cls = type(module)
    found = _LAYER_TYPES.get(cls) or _LAYER_TYPES.get(f"{cls.__module__}.{cls.__qualname__}")
    return found == _LAYER_TYPES[nn.Linear]


def _name(layer_type: type[nn.Module] | str) -> str:
    return layer_type if isinstance(layer_type, str) else layer_type.__name__


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Find all modules of a registered type, by their full names and in the order of registration in the model.

    Example:
        >>> list(quantizable_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))))
        ['0', '2']
    """
    return {name: module for name, module in model.named_modules() if layer_type_of(module) is not None}


def require_full_precision(layers: Mapping[str, nn.Module]) -> None:
    """Refuse weights of 16 bits: scales, gradients and small changes of the weights would be lost in them.

    Args:
        layers: Layers by name.

    Raises:
        ValueError: If a parameter is float16 or bfloat16; the message names its layer.

    Example:
        >>> require_full_precision({"fc": nn.Linear(2, 2)})
    """
    for name, module in layers.items():
        for what, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                kind = str(parameter.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{name}: its {what} is {kind}, in which scales and small changes would be lost: quantize "
                    "model.float(); calibration may run in 16 bits all the same, under "
                    'Trainer(precision="bf16-mixed").'
                )


def names_operations(pattern: str) -> bool:
    """Whether a pattern of layer names is meant for operations between layers.

    Example:
        >>> names_operations("*addition_*"), names_operations("a*")
        (True, False)
    """
    return "addition" in pattern or "average_pool" in pattern


def names_products(pattern: str, knows_attention: bool) -> bool:
    """Whether a pattern of layer names is meant for products that a model computes by functions.

    Args:
        pattern: The pattern.
        knows_attention: Whether the model's products of attention have names before it runs.

    Example:
        >>> names_products("*.fused_attention_0.*", True), names_products("*query_key*", True)
        (True, False)
    """
    parts = ("fused_attention", "matrix_product", *(() if knows_attention else ("query_key", "probability_value")))
    return any(part in pattern for part in parts)


def reads_indices(module: nn.Module) -> bool:
    """Whether a layer looks rows of its weight up and has no input to quantize, as an embedding does.

    Example:
        >>> reads_indices(nn.Embedding(3, 2)), reads_indices(nn.Linear(3, 2))
        (True, False)
    """
    layer_type = layer_type_of(module)
    return layer_type is not None and not layer_type.operands and not layer_type.part


_CONVOLUTIONS = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))

for _dimensions, (_conv, _transposed) in enumerate(_CONVOLUTIONS, start=1):
    # A convolution sums over channels and positions, so a range found at run time is that of a sample.
    _input = Operand(tuple(range(-_dimensions - 1, 0)), (2,) if _dimensions == 1 else (), channel_axis=-_dimensions - 1)
    register_layer(_conv, 0, [_input], _input.token_axes, adds_bias=True, input_axis=1)
    register_layer(_transposed, 1, [_input], _input.token_axes, input_axis=0)
register_layer(nn.Linear, operands=[Operand(channel_axis=-1)], adds_bias=True, input_axis=1)
register_layer(nn.Embedding, 0, operands=())
