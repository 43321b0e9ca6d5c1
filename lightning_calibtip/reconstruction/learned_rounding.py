"""Learned rounding (AdaRound: Nagel et al. 2020): which way each weight is rounded, as a relaxed binary variable."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..network.layers import QuantizedLayer
from ..quantization.affine import along, decode, encode
from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.groups import from_groups, to_groups
from ..quantization.spec import PerChannel, PerGroup
from .rounding import Rounding, WeightTrainable, register_rounding

# The sigmoid is stretched beyond 0 and 1 and clipped, so that it reaches them.
_LOW, _HIGH = -0.1, 1.1
# The exponent of the regulariser falls from the first to the second; during the warm-up it does not act at all.
_FIRST_EXPONENT, _LAST_EXPONENT = 20.0, 2.0
_WARM_UP = 0.2


def soft_rounding(variable: Tensor) -> Tensor:
    """How far each weight is rounded up, 0 to 1: the rectified sigmoid ``h(v)`` (Nagel et al. 2020, eq. 23).

    Args:
        variable: Variables ``v``, any shape.

    Example:
        >>> soft_rounding(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(variable) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def hard_rounding(variable: Tensor) -> Tensor:
    """Whether each weight is rounded up, 0 or 1, once its variable has decided.

    Args:
        variable: Variables ``v``, any shape.

    Example:
        >>> hard_rounding(torch.tensor([-0.1, 0.1]))
        tensor([0., 1.])
    """
    return (variable > 0).float()


def rounding_regulariser(variable: Tensor, progress: float) -> Tensor | None:
    """Sum of ``1 - |2 h(v) - 1|^beta``, which drives each variable to a decision (Nagel et al. 2020, eq. 24).

    Args:
        variable: Variables ``v``, any shape.
        progress: Share of the steps that are done, 0 to 1.

    Returns:
        A scalar; None during the warm-up, while the regulariser does not act yet.

    Example:
        >>> rounding_regulariser(torch.zeros(3), 1.0)
        tensor(3.)
    """
    if progress < _WARM_UP:
        return None
    done = (progress - _WARM_UP) / (1 - _WARM_UP)
    exponent = _FIRST_EXPONENT + (_LAST_EXPONENT - _FIRST_EXPONENT) * done
    return (1 - (2 * soft_rounding(variable) - 1).abs().pow(exponent)).sum()


@register_rounding("learned")
class LearnedRounding(Rounding):
    """Keeps the weight and learns the way each of its elements is rounded.

    The weight is ``(clip(floor(w / scale) + h(v) + zero_point) - zero_point) * scale``. At first ``h(v)`` is the
    fraction that ``floor`` takes away, so that nothing is rounded yet. The scale goes on learning, if it is to.

    Args:
        layer: Layer whose weight, its own, has an affine quantizer.

    Raises:
        ValueError: If the quantizer is of another kind.

    Example:
        See ``register_rounding``.
    """

    learns_zero_points = False

    def __init__(self, layer: QuantizedLayer) -> None:
        self.check(layer)
        super().__init__(layer)
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, AffineQuantizer)
        self._weight = _RoundedWeight(quantizer, layer.weight.detach())
        self.variable = self._weight.variable

    @classmethod
    def check(cls, layer: QuantizedLayer) -> None:
        """See ``Rounding``."""
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, AffineQuantizer) or not quantizer.acts_as_stored:
            raise ValueError(
                f'{layer.name}: rounding="learned" needs an affine quantizer of the weight, got '
                f'{type(layer.weight_quantizer).__name__}; use rounding="straight_through".'
            )

    def trainables(self) -> list[WeightTrainable]:
        """See ``Rounding``."""
        return [WeightTrainable(self.variable, 1.0, "rounding")]

    @contextmanager
    def acting(self) -> Iterator[None]:
        """See ``Rounding``."""
        place: ParametrizationList = self.layer.module.parametrizations[self.layer.type.weight]  # type: ignore[index, assignment]
        place[0] = self._weight
        try:
            yield
        finally:
            place[0] = self._weight.quantizer
            with torch.no_grad():
                self.layer.weight.copy_(self._weight.decided())

    def penalty(self, progress: float) -> Tensor | None:
        """See ``Rounding``."""
        return rounding_regulariser(self.variable, progress)


class _RoundedWeight(nn.Module):
    """Stands in for a weight quantizer while the rounding is learned."""

    def __init__(self, quantizer: AffineQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        spec, granularity = quantizer.spec, quantizer.spec.granularity
        self._groups = granularity if isinstance(granularity, PerGroup) else None
        # Groups are rows, with a scale for each.
        self._axis = 0 if self._groups else granularity.axis if isinstance(granularity, PerChannel) else None
        rows, scale, point = self._rows(weight.float()), quantizer.scale.detach(), quantizer.zero_point.detach()
        floor = encode(rows, scale, torch.zeros_like(point), -math.inf, math.inf, self._axis, rounding=torch.floor)
        fraction = (rows / along(scale, rows.dim(), self._axis) - floor).clamp(1e-4, 1 - 1e-4)
        variable = -torch.log((_HIGH - _LOW) / (fraction - _LOW) - 1)
        self._shape = weight.shape
        self._floor = self._restored(floor)
        self._point = along(point.round().clamp(spec.qmin, spec.qmax), rows.dim(), self._axis)
        self.variable = nn.Parameter(torch.empty_like(weight).copy_(self._restored(variable)))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is rounded so far."""
        return self._decode(soft_rounding(self.variable)).to(weight.dtype)

    @torch.no_grad()
    def decided(self) -> Tensor:
        """The weight with every variable rounded."""
        return self._decode(hard_rounding(self.variable))

    def _decode(self, up: Tensor) -> Tensor:
        quantizer, spec = self.quantizer, self.quantizer.spec
        integers = (self._rows(self._floor + up) + self._point).clamp(spec.qmin, spec.qmax)
        real = decode(integers, quantizer.scale, quantizer.zero_point, spec.qmin, spec.qmax, self._axis)
        return self._restored(real)

    def _rows(self, weight: Tensor) -> Tensor:
        """The weight with a row for each scale, where it is quantized in groups."""
        return weight if self._groups is None else to_groups(weight, self._groups.axis, self._groups.size)

    def _restored(self, rows: Tensor) -> Tensor:
        return rows if self._groups is None else from_groups(rows, self._shape, self._groups.axis)
