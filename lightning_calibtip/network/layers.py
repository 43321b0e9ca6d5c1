"""How a layer of the user's becomes a quantized one without changing its class."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.quantizers import Quantizer, make_quantizer
from ..quantization.ranges import RangeOptions, weight_range
from ..quantization.spec import Channels, LayerConfig
from .channels import along_weight, with_equalization
from .hooks import (
    INPUT_QUANTIZERS,
    OUTPUT_QUANTIZER,
    make_room_for_bias,
    observing_activations,
    products_grid,
    quantize_inputs,
    quantize_output,
    restore_bias,
    round_bias,
)
from .layer_types import LayerType
from .operation_kinds import is_operation
from .states import LayerState
from .tensors import ObservedTensor
from .tying import remove_parametrization, share_parametrization, stop_sharing_parametrization


@dataclass(eq=False)
class QuantizedLayer:
    """A layer of the user's model with quantizers on its weight, its inputs and its output, as its config says.

    The layer keeps its class and its ``forward``: the weight is under ``torch.nn.utils.parametrize``, the inputs go
    through a forward pre-hook, the output through a forward hook. ``attach`` puts them on.

    Args:
        name: Full name in the model.
        module: The layer.
        type: What is known of its type.
        config: Present format of its tensors.
        tensors: The activations that it reads, one for each operand of its type.
        output_tensor: The activation that it writes.
        tied_to: The layer that owns its weight, if that is another one; ``weight`` is then empty.
        variants: Reconstructed states in other formats.
        range_options: How ranges are chosen; set by calibration.
        errors: Relative output error of its unit before and after reconstruction; None if it was not reconstructed.
        first_device: Device for the first quantizer of a layer without parameters.

    Example:
        >>> from lightning_calibtip.network.network import QuantizedNetwork
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=4, edge_bits=None))
        >>> network.prepare(lambda: model(torch.ones(1, 2)))
        >>> layer = network.layers["0"]
        >>> layer.config.bit_widths.label, type(model[0]).__mro__[1].__name__
        ('W4A8', 'Linear')
        >>> state = layer.save()
        >>> layer.restore(state)
    """

    name: str
    module: nn.Module
    type: LayerType
    config: LayerConfig
    tensors: tuple[ObservedTensor, ...]
    output_tensor: ObservedTensor
    tied_to: "QuantizedLayer | None" = None
    variants: dict[LayerConfig, LayerState] = field(default_factory=dict)
    range_options: RangeOptions = field(default_factory=RangeOptions)
    errors: tuple[float, float] | None = None
    first_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    float_weight: Tensor = field(init=False)
    float_bias: Tensor | None = field(init=False)
    weight_quantizer: Quantizer | None = field(init=False, default=None)
    _enabled: bool = field(init=False, default=False)
    # Latent weight and bias, while the float ones stand in their places.
    _latent: tuple[Tensor, Tensor | None] | None = field(init=False, default=None)
    _hooks: list[Any] = field(init=False, default_factory=list)

    @torch.no_grad()
    def attach(self) -> None:
        """Put (disabled) quantizers on the layer, whose weight and bias as they are now become its float reference."""
        if self.tied_to is not None:
            share_parametrization(self.module, self.tied_to.module, self._weight_name)
        elif self.has_weight:
            parametrize.register_parametrization(self.module, self._weight_name, nn.Identity(), unsafe=True)
        self.module.add_module(INPUT_QUANTIZERS, nn.ModuleDict())
        self._hooks.append(self.module.register_forward_pre_hook(quantize_inputs, with_kwargs=True))
        self.float_weight = self.weight.detach().clone()
        self.float_bias = None if self.bias is None else self.bias.detach().clone()
        self.install(self.config)

    def detach(self) -> None:
        """Take the quantizers off again; the layer is as it was before ``attach``."""
        self.show_float(False)
        if self.tied_to is not None:
            stop_sharing_parametrization(self.module, self._weight_name)
        elif self.has_weight:
            remove_parametrization(self.module, self._weight_name, keep_value=False)
        for hook in self._hooks:
            hook.remove()
        for name in (INPUT_QUANTIZERS, OUTPUT_QUANTIZER):
            if name in self.module._modules:
                delattr(self.module, name)

    def install(self, config: LayerConfig) -> None:
        """Set the format of the layer and leave ranges, weight and bias as they are; new quantizers have the calibrated
        range of their tensor, if there is one."""
        self.config = config
        if self.has_weight and (self.weight_quantizer is None or self.weight_quantizer.spec != config.weight):
            quantizer = None
            if config.weight is not None:
                quantizer = make_quantizer(f"{self.name} weight", config.weight, self.weight.shape, self.device)
            self.weight_quantizer = quantizer
            self._parametrizations[0] = quantizer or nn.Identity()
        inputs: nn.ModuleDict = self.module.input_quantizers  # type: ignore[assignment]
        inputs.clear()
        for position, (tensor, spec) in enumerate(zip(self.tensors, config.inputs, strict=True)):
            if spec is not None:
                inputs[str(position)] = quantizer = tensor.quantizer(spec, self.device)
                if spec.equalized is not None and spec.equalized.inverse:
                    quantizer.ratio = inputs["0"].ratio
        self._install_output(config)
        self.set_enabled(self._enabled)

    def _install_output(self, config: LayerConfig) -> None:
        while len(self._hooks) > 1:
            self._hooks.pop().remove()
        if config.integer_bias:
            self._hooks.append(self.module.register_forward_pre_hook(round_bias))
            self._hooks.append(self.module.register_forward_hook(restore_bias, always_call=True))
        if config.output is None:
            self.module._modules.pop(OUTPUT_QUANTIZER, None)
            return
        self.module.add_module(OUTPUT_QUANTIZER, self.output_tensor.quantizer(config.output, self.device))
        self._hooks.append(self.module.register_forward_hook(quantize_output))

    @property
    def _weight_name(self) -> str:
        return self.type.weight or "weight"

    @property
    def _parametrizations(self) -> Any:
        return self.module.parametrizations[self._weight_name]  # type: ignore[index]

    @property
    def has_weight(self) -> bool:
        """Whether it has a weight of its own: not a matrix product, nor a layer tied to another one's weight."""
        return self.type.channel_axis is not None and self.tied_to is None

    @property
    def weight(self) -> Tensor:
        """The latent weight, which the weight quantizer rounds (the module's own attribute gives the rounded one);
        empty if there is none of its own."""
        if not self.has_weight:
            return torch.empty(0, device=self.device)
        original: Tensor = self._parametrizations.original
        return original

    @property
    def bias(self) -> Tensor | None:
        """The bias, or None."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def channel_axis(self) -> int:
        """Output-channel dimension of the weight."""
        return self.type.channel_axis or 0

    @property
    def device(self) -> torch.device:
        """Device of its weight, or else of its quantizers."""
        if self.has_weight:
            device: torch.device = self._parametrizations.original.device
            return device
        if self.tied_to is not None:
            return self.tied_to.device
        parameters = (parameter for quantizer in self._activation_quantizers for parameter in quantizer.parameters())
        return next((parameter.device for parameter in parameters), self.first_device)

    @property
    def input_quantizers(self) -> tuple[Quantizer | None, ...]:
        """Quantizer of each operand; None where it stays in float."""
        inputs: Any = self.module.input_quantizers
        return tuple(inputs[key] if (key := str(i)) in inputs else None for i in range(len(self.tensors)))

    @property
    def output_quantizer(self) -> Quantizer | None:
        """Quantizer of the output; None where it stays in float."""
        found: Any = self.module._modules.get(OUTPUT_QUANTIZER)
        return found

    @property
    def _activation_quantizers(self) -> tuple[Quantizer, ...]:
        inputs: Any = self.module._modules.get(INPUT_QUANTIZERS) or {}
        return tuple(found for found in (*inputs.values(), self.output_quantizer) if found is not None)

    @property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Quantizers of the weight, if it is its own, of the inputs and of the output."""
        weight = () if self.weight_quantizer is None else (self.weight_quantizer,)
        return (*weight, *self._activation_quantizers)

    @property
    def observed(self) -> bool:
        """Whether calibration batches have passed all its inputs."""
        return all(tensor.observed for tensor in self.tensors)

    def set_enabled(self, enabled: bool) -> None:
        """Switch all its quantizers on or off."""
        self._enabled = enabled
        for quantizer in self.quantizers:
            quantizer.enabled = enabled

    @property
    def enabled(self) -> bool:
        """Whether its quantizers are at work."""
        return self._enabled

    @contextmanager
    def observing(self, tokens: Tensor | None) -> Iterator[None]:
        """Inside, the observers of its activations see what passes.

        Args:
            tokens: Which tokens of the batch count, bool, shape (batch, positions); all if None.
        """
        # An operation between layers may read a part of what a layer reads: the whole is seen there.
        seen_elsewhere = self.type.between_layers
        inputs = [
            None if seen_elsewhere and any(is_operation(name) is None for name in tensor.readers) else tensor
            for tensor in self.tensors
        ]
        with observing_activations(self.module, inputs, self.output_tensor, tokens):
            yield

    @property
    def shows_float(self) -> bool:
        """Whether the float weight and bias stand in the places of the latent ones."""
        return self._latent is not None

    def show_float(self, wanted: bool) -> None:
        """Put the float reference weight and bias in the places of the latent ones, or those back."""
        if wanted == self.shows_float:
            return
        weight, bias = self.weight, self.bias
        if wanted:
            self._latent = (weight.data, None if bias is None else bias.data)
            shown: tuple[Tensor, Tensor | None] = (self.float_weight, self.float_bias)
        else:
            assert self._latent is not None
            shown, self._latent = self._latent, None
        if self.has_weight:
            weight.data = shown[0].to(weight.device)
        if bias is not None and shown[1] is not None:
            bias.data = shown[1].to(bias.device)

    def latent(self) -> tuple[Tensor, Tensor | None]:
        """The latent weight and bias as they are computed with in integers, also while the float ones are shown."""
        if self._latent is not None:
            return self._latent
        return self.weight.detach(), None if self.bias is None else self.bias.detach()

    def acting_bias(self) -> Tensor | None:
        """The bias that the quantized layer adds; None if it has none."""
        bias, (quantizer, *_) = self.latent()[1], (*self.input_quantizers, None)
        weights = (self.tied_to or self).weight_quantizer
        if bias is None or not self.config.integer_bias:
            return bias
        assert isinstance(quantizer, AffineQuantizer) and isinstance(weights, AffineQuantizer)
        return products_grid(bias, quantizer, weights)

    @property
    def input_ratio(self) -> Tensor | None:
        """Ratios of the channels of its first input, shape (channels,), where these are equalized."""
        quantizer = next(iter(self.input_quantizers), None)
        return quantizer.ratio if isinstance(quantizer, AffineQuantizer) else None

    @torch.no_grad()
    def equalize(self, channels: Channels | None, ratio: Tensor | None) -> None:
        """Equalize the channels of its first input: the weight, or a product's second input, takes ratios in, and the
        weight has its range chosen anew; inputs have quantizers that divide, whose ranges are for the caller to choose.

        Args:
            channels: Which channels the input has; None to end the equalization.
            ratio: Their ratios, shape (channels,).
        """
        weight, present = self.latent()[0], self.input_ratio
        if present is not None and self.has_weight:
            weight.div_(along_weight(present, self.module, self.type, weight))
        self.install(with_equalization(self.config, self.type, channels))
        if ratio is not None:
            assert self.input_ratio is not None
            self.input_ratio.copy_(ratio)
            if self.has_weight:
                weight.mul_(along_weight(ratio, self.module, self.type, weight))
        self.fit_weight_range()

    def fit_ranges(self) -> None:
        """Choose all ranges for the present format, from the weight and from what was observed of activations; channels
        of inputs are not equalized any longer.

        Raises:
            RuntimeError: If no calibration batch has reached the layer.
        """
        if self.input_ratio is not None:
            self.equalize(None, None)
        self.fit_weight_range()
        for tensor, spec in zip(self.tensors, self.config.inputs, strict=True):
            tensor.require_observed()
            tensor.learnable = None
            if spec is not None:
                tensor.fit_range(spec)
        if self.config.output is not None:
            self.output_tensor.fit_range(self.config.output)
        make_room_for_bias(self.config, self.latent()[1], self.input_quantizers, self.weight_quantizer)

    def fit_weight_range(self) -> None:
        """Choose the range of the weight, if it is the layer's own and quantized."""
        if self.weight_quantizer is not None:
            spec = self.weight_quantizer.spec
            self.weight_quantizer.set_range(*weight_range(self.latent()[0], spec, self.range_options))

    @torch.no_grad()
    def switch(self, config: LayerConfig) -> None:
        """Go to another format: to the state that reconstruction found for it, if there is one, else to the float
        weights with new ranges.

        The quantizer of a tensor that other layers read too keeps its range: it may be in use there.

        Raises:
            RuntimeError: If neither is possible, for want of calibration.
        """
        if config in self.variants:
            self.restore(self.variants[config])
            return
        wanted = [tensor for tensor, spec in zip(self.tensors, config.inputs, strict=True) if spec is not None]
        for tensor in [*wanted, *([self.output_tensor] if config.output is not None else [])]:
            tensor.require_observed()
        self._write(self.float_weight, self.float_bias)
        self.errors = None
        self.install(config.without_equalization)
        self.fit_weight_range()
        for tensor, quantizer in zip(self.tensors, self.input_quantizers, strict=True):
            if quantizer is not None and not tensor.shared:
                tensor.fit_range(quantizer.spec)
        if config.output is not None:
            self.output_tensor.fit_range(config.output)
        make_room_for_bias(self.config, self.latent()[1], self.input_quantizers, self.weight_quantizer)

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the float weights, with ranges alone, in the present format.

        Raises:
            RuntimeError: If no calibration batch has reached the layer.
        """
        self.variants.clear()
        self.install(self.config.without_equalization)
        self._write(self.float_weight, self.float_bias)
        self.errors = None
        self.fit_ranges()

    def save(self) -> LayerState:
        """Copy of everything that can change."""
        weight, bias = self.latent()
        qparams = [tensor.detach().clone() for tensor in self._qparams()]
        return LayerState(self.config, self.errors, weight.clone(), None if bias is None else bias.clone(), qparams)

    @torch.no_grad()
    def restore(self, state: LayerState) -> None:
        """Put a saved state back."""
        self.install(state.config)
        self.errors = state.errors
        self._write(state.weight, state.bias)
        for place, value in zip(self._qparams(), state.qparams, strict=True):
            place.copy_(value)

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set the latent weight and bias."""
        latent_weight, latent_bias = self.latent()
        if self.has_weight:
            latent_weight.copy_(weight)
        if latent_bias is not None and bias is not None:
            latent_bias.copy_(bias)

    def _qparams(self) -> list[Tensor]:
        return [parameter for quantizer in self.quantizers for parameter in quantizer.parameters()]

    def integer_weight(self) -> Tensor:
        """Weight, which must be the layer's own and quantized, as the integers (int32) that a checkpoint holds."""
        assert self.weight_quantizer is not None
        return self.weight_quantizer.encode(self.latent()[0]).to(torch.int32)
