"""Rounding methods: what is learned of a weight and how it is rounded meanwhile, each registered by name."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..network.layers import QuantizedLayer
from .objectives import Objective

STRAIGHT_THROUGH = "straight_through"

_ROUNDINGS: dict[str, type["Rounding"]] = {}


class WeightTrainable(NamedTuple):
    """A parameter that is learned in order to round a weight well.

    Args:
        parameter: The parameter.
        step: Change of the parameter that counts as one quantization step, where rates are relative.
        role: ``"weight"`` learns with ``weight_rate``, ``"rounding"`` with ``rounding_rate``.

    Example:
        >>> WeightTrainable(torch.zeros(3), step=0.1, role="weight").role
        'weight'
    """

    parameter: Tensor
    step: float
    role: str


class Rounding:
    """How the weight of one layer is rounded while its unit is reconstructed; subclasses override what they need.

    Args:
        layer: Layer with a quantized weight of its own.

    Attributes:
        learns_zero_points: Whether zero points of the weight may move meanwhile.
        learns_scales: Whether the scales and zero points of the weight may move meanwhile.
        start: How the weight is rounded before the first step, where that is decided by the method: ``"feedback"``;
            ``""`` leaves it to ``AdaQuantOptions.start``.
        learns_ratios: Whether the weight may be multiplied by ratios of the input's channels that learn meanwhile.

    Example:
        See ``register_rounding``.
    """

    learns_zero_points = True
    learns_scales = True
    learns_ratios = False
    start = ""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer = layer

    @classmethod
    def check(cls, layer: QuantizedLayer) -> None:
        """Raise ``ValueError``, with the layer's name, if this method cannot round its weight.

        Args:
            layer: Layer with a quantized weight of its own.
        """

    def trainables(self) -> list[WeightTrainable]:
        """What is learned, besides the parameters of the weight's quantizer."""
        return []

    def acting(self) -> AbstractContextManager[None]:
        """Context in which the weight is rounded by this method; at its end the layer's latent weight rounds to
        nearest as the method has decided."""
        return nullcontext()

    def penalty(self, progress: float) -> Tensor | None:
        """Regulariser, a sum over the elements of the weight, by the share of the steps that are done (0 to 1); None
        while there is none."""
        return None


def register_rounding(name: str) -> Callable[[type[Rounding]], type[Rounding]]:
    """Class decorator that makes a ``Rounding`` available as ``AdaQuantOptions(rounding=name)``.

    Args:
        name: Name of the rounding method.

    Example:
        >>> @register_rounding("frozen")
        ... class Frozen(Rounding):
        ...     '''Learns scales and biases, and leaves the weights where they are.'''
        >>> rounding_method("frozen").__name__
        'Frozen'
    """

    def register(method: type[Rounding]) -> type[Rounding]:
        _ROUNDINGS[name] = method
        return method

    return register


def check_rounding(name: str) -> None:
    """Raise ``ValueError`` unless a rounding method of this name is registered.

    Args:
        name: Name of the rounding method.

    Example:
        >>> check_rounding("straight_through")
    """
    if name not in _ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(_ROUNDINGS)}, got {name!r}.")


def rounding_method(name: str) -> type[Rounding]:
    """The rounding method registered as ``name``. See ``register_rounding``.

    Args:
        name: Name of the rounding method.
    """
    return _ROUNDINGS[name]


class RoundingPenalty(Objective):
    """The regularisers of the rounding of all weights of a unit: their mean over the weights' elements.

    Args:
        roundings: Rounding of each weight.
        strength: Factor of the mean.

    Example:
        >>> RoundingPenalty([], strength=1.0).penalty(0.5) is None
        True
    """

    def __init__(self, roundings: Sequence[Rounding], strength: float) -> None:
        super().__init__([rounding.layer for rounding in roundings])
        self.roundings, self.strength = tuple(roundings), strength
        self._count = sum(layer.weight.numel() for layer in self.layers)

    def penalty(self, progress: float) -> Tensor | None:
        """See ``Objective``."""
        found = [part for rounding in self.roundings if (part := rounding.penalty(progress)) is not None]
        if not found:
            return None
        return self.strength * (sum(found, torch.zeros(())) / self._count)


@register_rounding(STRAIGHT_THROUGH)
class StraightThrough(Rounding):
    """Moves the weight and rounds it to nearest, with straight-through gradients (AdaQuant: Hubara et al. 2021).

    Example:
        See ``register_rounding``.
    """

    learns_ratios = True

    def trainables(self) -> list[WeightTrainable]:
        """See ``Rounding``."""
        quantizer = self.layer.weight_quantizer
        assert quantizer is not None
        return [WeightTrainable(self.layer.weight, quantizer.step_size(), "weight")]
