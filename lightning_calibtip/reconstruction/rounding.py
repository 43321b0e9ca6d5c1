"""Learned rounding (AdaRound: Nagel et al. 2020): which way each weight is rounded, as a relaxed binary variable."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..quantization.layers import QuantizedLayer
from ..quantization.quantizer import Quantizer

# The sigmoid is stretched beyond 0 and 1 and clipped, so that it reaches them.
_LOW, _HIGH = -0.1, 1.1
# The exponent of the regulariser falls from the first to the second; during the warm-up it does not act at all.
_FIRST_EXPONENT, _LAST_EXPONENT = 20.0, 2.0
_WARM_UP = 0.2


class LearnedRounding(nn.Module):
    """Stands in for a weight quantizer: ``(clip(floor(w / scale) + h(v) + zero_point) - zero_point) * scale``.

    At first ``h(v)`` is the fraction that ``floor`` takes away, so that nothing is rounded yet.

    Args:
        quantizer: Of the weight; its scale goes on learning, if it is to.
        weight: The latent weight.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self._shape = [1 if dim != quantizer.axis else -1 for dim in range(weight.dim())]
        scaled = weight.detach() / self._along(quantizer.scale.detach())
        self.floor = scaled.floor()
        fraction = (scaled - self.floor).clamp(1e-4, 1 - 1e-4)
        self.variable = nn.Parameter(-torch.log((_HIGH - _LOW) / (fraction - _LOW) - 1))

    def _along(self, parameter: Tensor) -> Tensor:
        return parameter if self.quantizer.axis is None else parameter.view(self._shape)

    def up(self) -> Tensor:
        """``h(v)``: how far each weight is rounded up, 0 to 1."""
        return (torch.sigmoid(self.variable) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is rounded so far."""
        return self._dequantize(self.up()).to(weight.dtype)

    def _dequantize(self, up: Tensor) -> Tensor:
        on = self.quantizer
        point = self._along(on.zero_point.round())
        return ((self.floor + up + point).clamp(on.qmin, on.qmax) - point) * self._along(on.scale)

    @torch.no_grad()
    def decided(self) -> Tensor:
        """The weight with every variable rounded."""
        return self._dequantize((self.variable > 0).float())


@contextmanager
def learned_rounding(layers: Sequence[QuantizedLayer]) -> Iterator[list[LearnedRounding]]:
    """Inside, the layers' weights, all their own, are rounded by variables, which are given; afterwards as these have
    decided."""
    owned = [layer.weight_quantizer for layer in layers if layer.weight_quantizer is not None]
    roundings = [LearnedRounding(on, layer.weight) for on, layer in zip(owned, layers, strict=True)]
    places: list[nn.ModuleList] = [layer.module.parametrizations.weight for layer in layers]  # type: ignore[union-attr, misc]
    for place, rounding in zip(places, roundings, strict=True):
        place[0] = rounding
    try:
        yield roundings
    finally:
        for layer, place, rounding in zip(layers, places, roundings, strict=True):
            place[0] = rounding.quantizer
            with torch.no_grad():
                layer.weight.copy_(rounding.decided())


def undecided(roundings: Sequence[LearnedRounding], progress: float) -> Tensor | None:
    """The regulariser: the mean of ``1 - |2 h(v) - 1|^beta`` over all weights; None while it does not act yet.

    Args:
        roundings: Of all layers of the unit.
        progress: Share of the steps that are done, 0 to 1.
    """
    if progress < _WARM_UP:
        return None
    done = (progress - _WARM_UP) / (1 - _WARM_UP)
    exponent = _FIRST_EXPONENT + (_LAST_EXPONENT - _FIRST_EXPONENT) * done
    total = sum(((1 - (2 * r.up() - 1).abs().pow(exponent)).sum() for r in roundings), torch.zeros(()))
    return total / sum(rounding.variable.numel() for rounding in roundings)
