"""The state of a quantized layer: everything that quantizing, reconstructing or tuning it can change."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..quantization.spec import LayerConfig


@dataclass(frozen=True)
class LayerState:
    """Copies of everything that can change in a layer: enough to put it back exactly.

    Args:
        config: Format of the layer's tensors.
        errors: Relative output error of its unit before and after reconstruction; None if it was not reconstructed.
        weight: Latent weight; empty if the layer has none of its own.
        bias: Bias; None if there is none.
        qparams: Parameters of the quantizers (scales, zero points), in the order of ``QuantizedLayer.quantizers``.

    Example:
        See ``QuantizedLayer``.
    """

    config: LayerConfig
    errors: tuple[float, float] | None
    weight: Tensor
    bias: Tensor | None
    qparams: list[Tensor]

    def lerp(self, other: "LayerState", weight: float) -> "LayerState":
        """Linear interpolation to another state of the same format; what is no floating-point number is the other's.

        Args:
            other: The other state.
            weight: 0 for this state, 1 for the other one.
        """
        bias = None if self.bias is None or other.bias is None else _lerp(self.bias, other.bias, weight)
        qparams = [_lerp(start, end, weight) for start, end in zip(self.qparams, other.qparams, strict=True)]
        return replace(self, weight=_lerp(self.weight, other.weight, weight), bias=bias, qparams=qparams)

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which ``torch.load(weights_only=True)`` reads."""
        return {
            "config": self.config.to_dict(),
            "errors": None if self.errors is None else list(self.errors),
            "weight": self.weight,
            "bias": self.bias,
            "qparams": list(self.qparams),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerState":
        """Inverse of ``to_dict``."""
        errors = None if values["errors"] is None else (values["errors"][0], values["errors"][1])
        config = LayerConfig.from_dict(values["config"])
        return cls(config, errors, values["weight"], values["bias"], list(values["qparams"]))


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    if not start.is_floating_point():
        return end
    # Between equal infinities there is no number.
    return torch.where(start == end, end, start.lerp(end, weight))
