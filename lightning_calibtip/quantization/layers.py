"""How a layer of the user's becomes a quantized one without changing its class."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .kinds import LayerKind, layer_kind
from .quantizer import Quantizer
from .ranges import weight_range
from .scheme import Bits, QuantizationScheme
from .tying import remove_parametrization, share_parametrization, stop_sharing_parametrization

# Names of the quantizers below a layer, by operand.
INPUT_QUANTIZERS = ("input_quantizer", "second_input_quantizer")


def _quantize_inputs(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: the first floating-point tensors that the layer is given go through its quantizers."""
    waiting = [getattr(layer, name) for name in INPUT_QUANTIZERS if hasattr(layer, name)]

    def through(value: Any) -> Any:
        quantized = waiting and isinstance(value, Tensor) and value.is_floating_point()
        return waiting.pop(0)(value) if quantized else value

    return tuple(map(through, args)), {key: through(value) for key, value in kwargs.items()}


@dataclass
class LayerState:
    """Values of everything that quantizing or reconstructing a layer can change: enough to put it back exactly.

    ``qparams`` holds scale and zero point of each quantizer, in their order.
    """

    bits: Bits
    errors: tuple[float, float] | None
    weight: Tensor
    bias: Tensor | None
    qparams: list[Tensor]


@dataclass
class QuantizedLayer:
    """A layer of the user's model with quantizers on its weight and its inputs.

    The layer keeps its class and its ``forward``: the weight is under ``torch.nn.utils.parametrize``, the inputs under
    a forward pre-hook. Make one by ``attach``. An embedding has no quantized input; a matrix product, and a layer whose
    weight is tied to an embedding's, have no weight of their own: ``weight`` is then empty.

    Args:
        name: Full name in the model.
        module: The layer.
        kind: Of its type.
        bits: ``(weight_bits, activation_bits)``; without a weight, or without a quantized input, that part of it does
            not act.
        weight_quantizer: Of the weight, if it is its own.
        inputs: Quantizers of the inputs.
        tied_to: The layer that owns the weight, if that is another one.
        variants: Reconstructed states at other widths, by ``(weight_bits, activation_bits)``.
        range_methods: How ranges are chosen when the width changes; set by calibration.
        errors: Relative output error of its unit before and after reconstruction, if it was reconstructed.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    bits: Bits
    weight_quantizer: Quantizer | None
    inputs: tuple[Quantizer, ...]
    tied_to: "QuantizedLayer | None" = None
    variants: dict[Bits, LayerState] = field(default_factory=dict)
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
        bits: Bits,
        scheme: QuantizationScheme,
        device: torch.device | None = None,
        tied_to: "QuantizedLayer | None" = None,
    ) -> "QuantizedLayer":
        """Put (disabled) quantizers on a layer, whose weights and bias as they are now become its float reference.

        Args:
            name: Full name in the model.
            module: The layer.
            bits: ``(weight_bits, activation_bits)``.
            scheme: Formats of weight and inputs.
            device: Of the quantizers; that of the weight if None.
            tied_to: The layer that owns the weight and is attached already; None if the weight is the layer's own.

        Raises:
            TypeError: If the layer's type is not registered.
        """
        kind = layer_kind(module)
        if kind is None:
            raise TypeError(f"{name}: {type(module).__name__} is not quantizable; register it with register_layer().")
        on_weight = None
        if kind.channel_axis is not None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            device = device or weight.device
            if tied_to is None:
                axis = kind.channel_axis if scheme.per_channel else None
                channels = weight.shape[axis] if axis is not None else 1
                on_weight = Quantizer(f"{name} weight", bits[0], scheme.symmetric, axis, channels).to(device)
        inputs = tuple(
            Quantizer(
                f"{name} {what}",
                bits[1],
                scheme.activation_symmetric and not operand.unsigned,
                one_sided=True,
                operand=operand,
                dynamic=scheme.per_token and bool(operand.contracted),
            ).to(device)
            for what, operand in zip(("input", "second input"), kind.operands, strict=False)
        )
        layer = cls(name, module, kind, bits, on_weight, inputs, tied_to)
        layer.keep_float_reference()
        if on_weight is not None:
            parametrize.register_parametrization(module, "weight", on_weight, unsafe=True)
        elif tied_to is not None:
            share_parametrization(module, tied_to.module)
        for key, quantizer in zip(INPUT_QUANTIZERS, inputs, strict=False):
            module.add_module(key, quantizer)
        if inputs:
            layer._hook = module.register_forward_pre_hook(_quantize_inputs, with_kwargs=True)
        return layer

    def detach(self) -> None:
        """Take the quantizers off again; the layer is as it was before ``attach``."""
        self.set_enabled(False)
        if self.weight_quantizer is not None:
            remove_parametrization(self.module, "weight", keep_value=False)
        elif self.tied_to is not None:
            stop_sharing_parametrization(self.module)
        if self._hook is not None:
            self._hook.remove()
        for key, _ in zip(INPUT_QUANTIZERS, self.inputs, strict=False):
            delattr(self.module, key)

    def keep_float_reference(self) -> None:
        """Take the present weight and bias as what ``as_float`` goes back to."""
        self.float_weight = self.weight.detach().clone()
        self.float_bias = None if self.bias is None else self.bias.detach().clone()

    @property
    def weight(self) -> Tensor:
        """The latent weight, which the weight quantizer rounds (``module.weight`` is the rounded one); empty if there
        is none of its own."""
        if self.weight_quantizer is None:
            return torch.empty(0, device=self.device)
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
    def channel_axis(self) -> int:
        """Output-channel dimension of the weight."""
        return self.kind.channel_axis or 0

    @property
    def device(self) -> torch.device:
        """Where its quantizers are."""
        return self._first_quantizer.scale.device

    @property
    def _first_quantizer(self) -> Quantizer:
        """One that there always is: an embedding that is tied to another one has none of its own."""
        return (*self.quantizers, *(self.tied_to.quantizers if self.tied_to else ()))[0]

    @property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Quantizers of the weight, if it is its own, and of the inputs."""
        return (*(() if self.weight_quantizer is None else (self.weight_quantizer,)), *self.inputs)

    @property
    def enabled(self) -> bool:
        """Whether its quantizers are at work."""
        return self._first_quantizer.enabled

    @property
    def observed(self) -> bool:
        """Whether calibration batches have passed all its inputs."""
        return all(quantizer.observer is not None and quantizer.observer.seen for quantizer in self.inputs)

    def acting(self, bits: Bits) -> tuple[int | None, int | None]:
        """The parts of a width that act on this layer: None for the weight's if it is not its own, and for the
        activation's if no input is quantized."""
        return (bits[0] if self.weight_quantizer is not None else None), (bits[1] if self.inputs else None)

    def set_bits(self, bits: Bits) -> None:
        """Set the widths and leave the ranges as they are."""
        self.bits = bits
        if self.weight_quantizer is not None:
            self.weight_quantizer.bits = bits[0]
        for quantizer in self.inputs:
            quantizer.bits = bits[1]

    def set_enabled(self, enabled: bool) -> None:
        """Switch all quantizers."""
        for quantizer in self.quantizers:
            quantizer.enabled = enabled

    def fit_ranges(self, bits: Bits) -> None:
        """Set the width and choose all ranges for it: the weight's from the weight, the inputs' from what was observed.

        Raises:
            RuntimeError: If no calibration batch has reached the layer.
        """
        self.set_bits(bits)
        methods = {"method": "mse", **self.range_methods}
        if (on := self.weight_quantizer) is not None:
            on.set_range(*weight_range(self.weight, bits[0], on.symmetric, on.axis, **methods))
        if not self.observed:
            raise RuntimeError(f"{self.name}: no calibration batch has reached this layer; run Calibration first.")
        for quantizer in self.inputs:
            assert quantizer.observer is not None
            quantizer.set_range(*quantizer.observer.compute_range(bits[1], quantizer.symmetric))

    @torch.no_grad()
    def take(self, bits: Bits) -> None:
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
        qparams = [tensor.detach().clone() for tensor in self._qparams()]
        bias = None if self.bias is None else self.bias.detach().clone()
        return LayerState(self.bits, self.errors, self.weight.detach().clone(), bias, qparams)

    @torch.no_grad()
    def restore(self, state: LayerState) -> None:
        """Put a saved state back."""
        self.set_bits(state.bits)
        self.errors = state.errors
        self.weight.copy_(state.weight)
        if self.bias is not None and state.bias is not None:
            self.bias.copy_(state.bias)
        for place, value in zip(self._qparams(), state.qparams, strict=True):
            place.copy_(value)

    def _qparams(self) -> list[Tensor]:
        return [tensor for quantizer in self.quantizers for tensor in (quantizer.scale, quantizer.zero_point)]

    def integer_weight(self) -> Tensor:
        """Weight, which must be the layer's own, as the integers (int32) that a checkpoint holds."""
        assert self.weight_quantizer is not None
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
