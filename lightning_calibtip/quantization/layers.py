"""Which layers can be quantized, and how a layer of the user's becomes a quantized one without changing its class."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .quantizer import Quantizer
from .ranges import weight_range


@dataclass(frozen=True)
class LayerKind:
    """What the engine must know of a layer type.

    Args:
        channel_axis: Output-channel dimension of ``weight``.
    """

    channel_axis: int


_KINDS: dict[type[nn.Module], LayerKind] = {}


def register_layer(layer_type: type[nn.Module], channel_axis: int = 0) -> None:
    """Make a layer type, and its subclasses, quantizable.

    The type must compute its output from its first input and a parameter named ``weight``.

    Args:
        layer_type: Class of the layer.
        channel_axis: Output-channel dimension of its ``weight``.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(4, 1))
        ...     def forward(self, x):
        ...         return x * self.weight[:, 0]
        >>> register_layer(Scale, channel_axis=0)
        >>> layer_kind(Scale())
        LayerKind(channel_axis=0)
    """
    _KINDS[layer_type] = LayerKind(channel_axis)


for _conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_layer(_conv, channel_axis=0)
for _transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_layer(_transposed, channel_axis=1)
register_layer(nn.Linear, channel_axis=0)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Kind of the nearest registered class that ``module`` is an instance of, or None."""
    return next((_KINDS[cls] for cls in type(module).__mro__ if cls in _KINDS), None)


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a registered type by their full names, in the order of registration."""
    return {name: module for name, module in model.named_modules() if layer_kind(module) is not None}


def bake_parametrizations(layer: nn.Module) -> None:
    """Make parametrized tensors (weight norm, spectral norm) plain parameters of their present value."""
    for tensor in list(getattr(layer, "parametrizations", {})):
        _remove_parametrization(layer, tensor, keep_value=True)
        value = getattr(layer, tensor)
        delattr(layer, tensor)
        layer.register_parameter(tensor, nn.Parameter(value.detach().clone(), requires_grad=False))


def _remove_parametrization(layer: nn.Module, tensor: str, keep_value: bool) -> None:
    # A deep copy shares its class with the original, and removing changes the class.
    cls = type(layer)
    layer.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    parametrize.remove_parametrizations(layer, tensor, leave_parametrized=keep_value)


def untie(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Give layers that share a parameter with another module a copy of their own, and return these layers."""
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] += parameter is not None
    untied = []
    for layer in layers:
        for name, parameter in layer._parameters.items():
            if parameter is not None and owners[id(parameter)] > 1:
                owners[id(parameter)] -= 1
                layer._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                untied.append(layer)
    return untied


def _quantize_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: the first tensor that the layer is given goes through its quantizer."""
    quantizer = cast(Quantizer, layer.input_quantizer)
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:index], quantizer(value), *args[index + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, key: quantizer(value)}
    return args, kwargs


@dataclass
class LayerState:
    """Values of everything that quantizing or reconstructing a layer can change: enough to put it back exactly."""

    bits: tuple[int, int]
    errors: tuple[float, float] | None
    weight: Tensor
    bias: Tensor | None
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor


@dataclass
class QuantizedLayer:
    """A layer of the user's model with a quantizer on its weight and one on its input.

    The layer keeps its class and its ``forward``: the weight is under ``torch.nn.utils.parametrize``, the input under a
    forward pre-hook. Make one by ``attach``.

    Args:
        name: Full name in the model.
        module: The layer.
        channel_axis: Output-channel dimension of the weight.
        variants: Reconstructed states at other widths, by ``(weight_bits, activation_bits)``.
        range_methods: How ranges are chosen when the width changes; set by calibration.
        errors: Relative output error of its unit before and after reconstruction, if it was reconstructed.
    """

    name: str
    module: nn.Module
    channel_axis: int
    variants: dict[tuple[int, int], LayerState] = field(default_factory=dict)
    range_methods: dict[str, Any] = field(default_factory=dict)
    errors: tuple[float, float] | None = None
    float_weight: Tensor = field(init=False)
    float_bias: Tensor | None = field(init=False)
    _hook: Any = field(init=False, default=None)

    @classmethod
    def attach(
        cls,
        name: str,
        module: nn.Module,
        bits: tuple[int, int],
        weight_symmetric: bool,
        per_channel: bool,
        activation_symmetric: bool,
    ) -> "QuantizedLayer":
        """Put (disabled) quantizers on a layer, whose weights and bias as they are now become its float reference.

        Raises:
            TypeError: If the layer's type is not registered.
        """
        kind = layer_kind(module)
        if kind is None:
            raise TypeError(f"{name}: {type(module).__name__} is not quantizable; register it with register_layer().")
        layer = cls(name, module, kind.channel_axis)
        weight: Tensor = module.weight  # type: ignore[assignment]
        axis = kind.channel_axis if per_channel else None
        channels = weight.shape[axis] if axis is not None else 1
        on_weight = Quantizer(f"{name} weight", bits[0], weight_symmetric, axis, channels).to(weight.device)
        on_input = Quantizer(f"{name} input", bits[1], activation_symmetric, one_sided=True).to(weight.device)
        layer.keep_float_reference()
        parametrize.register_parametrization(module, "weight", on_weight, unsafe=True)
        module.input_quantizer = on_input
        layer._hook = module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
        return layer

    def detach(self) -> None:
        """Take the quantizers off again; the layer is as it was before ``attach``."""
        self.set_enabled(False)
        _remove_parametrization(self.module, "weight", keep_value=False)
        self._hook.remove()
        del self.module.input_quantizer

    def keep_float_reference(self) -> None:
        """Take the present weight and bias as what ``as_float`` goes back to."""
        self.float_weight = self.weight.detach().clone()
        self.float_bias = None if self.bias is None else self.bias.detach().clone()

    @property
    def weight(self) -> Tensor:
        """The latent weight, which the weight quantizer rounds (``module.weight`` is the rounded one)."""
        if parametrize.is_parametrized(self.module, "weight"):
            original: Tensor = self.module.parametrizations.weight.original  # type: ignore[union-attr, assignment]
            return original
        plain: Tensor = self.module.weight  # type: ignore[assignment]
        return plain

    @property
    def bias(self) -> Tensor | None:
        """The bias, or None."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def weight_quantizer(self) -> Quantizer:
        """Quantizer of the weight."""
        return self.module.parametrizations.weight[0]  # type: ignore[union-attr, index, return-value]

    @property
    def input_quantizer(self) -> Quantizer:
        """Quantizer of the input."""
        return self.module.input_quantizer  # type: ignore[return-value]

    @property
    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        """Quantizers of weight and input."""
        return self.weight_quantizer, self.input_quantizer

    @property
    def bits(self) -> tuple[int, int]:
        """``(weight_bits, activation_bits)``."""
        return self.weight_quantizer.bits, self.input_quantizer.bits

    def set_enabled(self, enabled: bool) -> None:
        """Switch both quantizers."""
        for quantizer in self.quantizers:
            quantizer.enabled = enabled

    def fit_ranges(self, bits: tuple[int, int]) -> None:
        """Set the width and choose both ranges for it: the weight's from the weight, the input's from what was
        observed.

        Raises:
            RuntimeError: If no calibration batch has reached the layer.
        """
        self.weight_quantizer.bits, self.input_quantizer.bits = bits
        on_weight, on_input = self.quantizers
        methods = {"method": "mse", **self.range_methods}
        on_weight.set_range(*weight_range(self.weight, bits[0], on_weight.symmetric, on_weight.axis, **methods))
        if on_input.observer is None or not on_input.observer.seen:
            raise RuntimeError(f"{self.name}: no calibration batch has reached this layer; run Calibration first.")
        on_input.set_range(*on_input.observer.compute_range(bits[1], on_input.symmetric))

    @torch.no_grad()
    def take(self, bits: tuple[int, int]) -> None:
        """Go to another width: to the state that reconstruction found for it, if it has, else to the float weights with
        new ranges.

        Raises:
            RuntimeError: If neither is possible, for want of calibration.
        """
        if bits in self.variants:
            self.restore(self.variants[bits])
            return
        self.weight.copy_(self.float_weight)
        if self.bias is not None and self.float_bias is not None:
            self.bias.copy_(self.float_bias)
        self.errors = None
        self.fit_ranges(bits)

    @contextmanager
    def as_float(self) -> Iterator[None]:
        """Inside, the layer has its float reference weight and bias, and nothing is quantized."""
        enabled = [quantizer.enabled for quantizer in self.quantizers]
        weight, bias = self.weight.data, None if self.bias is None else self.bias.data
        self.set_enabled(False)
        self.weight.data = self.float_weight.to(weight.device)
        if self.bias is not None and self.float_bias is not None:
            self.bias.data = self.float_bias.to(weight.device)
        try:
            yield
        finally:
            self.weight.data = weight
            if self.bias is not None and bias is not None:
                self.bias.data = bias
            for quantizer, was in zip(self.quantizers, enabled, strict=True):
                quantizer.enabled = was

    def save(self) -> LayerState:
        """Copy of everything that can change."""
        on_weight, on_input = self.quantizers
        tensors = [self.weight, on_weight.scale, on_weight.zero_point, on_input.scale, on_input.zero_point]
        weight, *qparams = (tensor.detach().clone() for tensor in tensors)
        bias = None if self.bias is None else self.bias.detach().clone()
        return LayerState(self.bits, self.errors, weight, bias, *qparams)

    @torch.no_grad()
    def restore(self, state: LayerState) -> None:
        """Put a saved state back."""
        on_weight, on_input = self.quantizers
        on_weight.bits, on_input.bits = state.bits
        self.errors = state.errors
        self.weight.copy_(state.weight)
        if self.bias is not None and state.bias is not None:
            self.bias.copy_(state.bias)
        on_weight.scale.copy_(state.weight_scale)
        on_weight.zero_point.copy_(state.weight_zero_point)
        on_input.scale.copy_(state.input_scale)
        on_input.zero_point.copy_(state.input_zero_point)

    def integer_weight(self) -> Tensor:
        """Weight as the integers (int32) that a checkpoint holds."""
        return self.weight_quantizer.integers(self.weight.detach())


@contextmanager
def learning(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, gradients reach exactly these parameters."""
    was = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, learned in zip(parameters, was, strict=True):
            parameter.requires_grad_(learned)
            parameter.grad = None
