"""A layer of which single parts are quantized, whatever the rest of the model computes in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .channels import along_weight
from .hooks import INPUT_QUANTIZERS, OUTPUT_QUANTIZER
from .layers import QuantizedLayer


class _Acting(nn.Module):
    """Stands for a quantizer in one layer: it rounds or does not, whether the quantizer itself is enabled or not."""

    def __init__(self, quantizer: Any, rounds: bool) -> None:
        super().__init__()
        # Not as a submodule: it belongs to the tensor, and moves with it.
        self._quantizer, self._rounds = [quantizer], rounds

    @property
    def at_work(self) -> Any:
        """The quantizer, where it rounds, for what depends on its step; None where it does not."""
        return self._quantizer[0] if self._rounds else None

    def forward(self, x: Tensor) -> Tensor:
        """The tensor, rounded or not; channels are divided by their ratios either way."""
        (quantizer,) = self._quantizer
        result: Tensor = quantizer.fake_quantize(x) if self._rounds else quantizer.unrounded(x)
        return result


@contextmanager
def computing(layer: QuantizedLayer, weight: bool, activations: bool) -> Iterator[None]:
    """Inside, the parts of one layer are quantized as it is told; other layers stay as they are.

    A quantized weight is the layer's present one, with its bias; one that is not quantized is the float reference, with
    the float bias. Where inputs are equalized, the weight has the ratios either way.

    Args:
        layer: A calibrated layer.
        weight: Whether the weight is quantized; it does not count where the layer has none of its own.
        activations: Whether its inputs, and its output where it has a quantizer, are quantized.

    Example:
        >>> from lightning_calibtip.network.network import QuantizedNetwork
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model, x = nn.Sequential(nn.Linear(2, 2)).eval(), torch.tensor([[0.3, -1.0]])
        >>> wanted = model(x)
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=2, edge_bits=None))
        >>> network.prepare(lambda: model(x))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = model(x)
        >>> network.fit_ranges()
        >>> with computing(network.layers["0"], weight=False, activations=False):
        ...     bool(torch.allclose(model(x), wanted))
        True
    """
    saved_weight, saved_bias = layer.weight.data, None if layer.bias is None else layer.bias.data
    parametrizations: Any = None
    if layer.has_weight:
        parametrizations = layer.module.parametrizations[layer.type.weight or "weight"]  # type: ignore[index]
    saved_parametrization = None if parametrizations is None else parametrizations[0]
    inputs: Any = layer.module._modules[INPUT_QUANTIZERS]
    saved_inputs, saved_output = dict(inputs.items()), layer.output_quantizer
    latent_weight, latent_bias = layer.latent()
    try:
        if parametrizations is not None:
            shown = latent_weight if weight else _float_weight(layer)
            layer.weight.data = shown.to(layer.device)
            rounds = weight and layer.weight_quantizer is not None
            parametrizations[0] = _Acting(layer.weight_quantizer, True) if rounds else nn.Identity()
            bias = latent_bias if weight else layer.float_bias
            if layer.bias is not None and bias is not None:
                layer.bias.data = bias.to(layer.device)
        for key, quantizer in saved_inputs.items():
            inputs[key] = _Acting(quantizer, activations)
        if saved_output is not None:
            layer.module._modules[OUTPUT_QUANTIZER] = _Acting(saved_output, activations)
        torch.clear_autocast_cache()
        yield
    finally:
        if parametrizations is not None:
            layer.weight.data = saved_weight
            parametrizations[0] = saved_parametrization
        if layer.bias is not None and saved_bias is not None:
            layer.bias.data = saved_bias
        for key, quantizer in saved_inputs.items():
            inputs[key] = quantizer
        if saved_output is not None:
            layer.module._modules[OUTPUT_QUANTIZER] = saved_output
        torch.clear_autocast_cache()


def _float_weight(layer: QuantizedLayer) -> Tensor:
    """The float reference, with the ratios of an equalized input."""
    ratio = layer.input_ratio
    if ratio is None:
        return layer.float_weight
    factors = along_weight(ratio.detach(), layer.module, layer.type, layer.float_weight)
    return layer.float_weight * factors.to(layer.float_weight)


def quantized_weight(layer: QuantizedLayer) -> tuple[Tensor, Tensor] | None:
    """The float reference of a layer's weight, and what stands for it in integers; None without a quantized weight of
    its own.

    Args:
        layer: A calibrated layer.

    Returns:
        Two tensors of the weight's shape, both with the ratios of an equalized input.

    Example:
        See ``computing``, in which the one or the other is computed with.
    """
    if layer.weight_quantizer is None:
        return None
    wanted = _float_weight(layer)
    return wanted, layer.weight_quantizer.decode(layer.integer_weight()).to(wanted.device)
