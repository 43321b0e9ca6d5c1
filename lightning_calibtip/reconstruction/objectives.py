"""Objectives: what the reconstruction of a unit minimises, each registered by name."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..network.layers import QuantizedLayer
from ..quantization.affine import dot

SQUARED_ERROR, FISHER = "squared_error", "fisher"

_OBJECTIVES: dict[str, type["Objective"]] = {}


class Objective:
    """A term of what the reconstruction of one unit minimises; subclasses override what they need.

    The optimiser minimises the sum of ``loss`` over a unit's output tensors, divided by its value before the first
    step, plus ``penalty``. A unit's relative error, before and after, is the sum of ``loss`` over the sum of ``power``,
    on held-out samples.

    Args:
        layers: Layers of the unit.

    Attributes:
        needs_loss: Whether the objective makes no sense without ``AdaQuantOptions.loss``.

    Example:
        See ``register_objective``.
    """

    needs_loss = False

    def __init__(self, layers: Sequence[QuantizedLayer] = ()) -> None:
        self.layers = tuple(layers)

    @classmethod
    def check_layers(cls, layers: Sequence[QuantizedLayer]) -> None:
        """Raise ``ValueError`` if the objective makes no sense for a model of these quantized layers."""

    def loss(self, output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor | None:
        """Distance of an output tensor of the unit from the float unit's, a sum over its elements.

        Args:
            output: Output of the quantized unit for a mini-batch.
            target: Output of the float unit, same shape; a copy that may be overwritten.
            weight: Weight of each element, broadcastable to ``output``: 0 for padding, and large where the elements
                matter to ``AdaQuantOptions.loss``; None if all weigh 1.

        Returns:
            A scalar; None if the objective does not depend on the output.
        """
        return None

    def power(self, target: Tensor, weight: Tensor | None) -> Tensor | None:
        """What ``loss`` would be for an output of zeros, which makes errors of different units comparable.

        Args:
            target: See ``loss``; not to be changed.
            weight: See ``loss``.
        """
        return None

    def row_weights(self, output: Tensor) -> Tensor | None:
        """Weights of the rows of an output tensor of the float unit, by which the ``weight`` of ``loss`` is multiplied;
        called right after the unit has run.

        Args:
            output: The tensor.

        Returns:
            Shape (rows,), with a mean of 1; None if all weigh 1.
        """
        return None

    def penalty(self, progress: float) -> Tensor | None:
        """Regulariser that is added to the relative loss; None while there is none.

        Args:
            progress: Share of the steps that are done, 0 to 1.
        """
        return None


def register_objective(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Class decorator that makes an ``Objective`` available as ``AdaQuantOptions(objective=name)``.

    Args:
        name: Name of the objective.

    Example:
        >>> @register_objective("absolute_error")
        ... class AbsoluteError(Objective):
        ...     def loss(self, output, target, weight):
        ...         difference = (output - target).abs()
        ...         return difference.sum() if weight is None else (difference * weight).sum()
        ...
        ...     def power(self, target, weight):
        ...         return self.loss(torch.zeros_like(target), target, weight)
        >>> make_objective("absolute_error", []).power(torch.tensor([3.0, -1.0]), None)
        tensor(4.)
    """

    def register(objective: type[Objective]) -> type[Objective]:
        _OBJECTIVES[name] = objective
        return objective

    return register


def check_objective(name: str, has_loss: bool) -> None:
    """Raise ``ValueError`` unless an objective of this name is registered and has the loss that it needs.

    Args:
        name: Name of the objective.
        has_loss: Whether ``AdaQuantOptions.loss`` is given.

    Example:
        >>> check_objective("squared_error", has_loss=False)
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(_OBJECTIVES)}, got {name!r}.")
    if _OBJECTIVES[name].needs_loss and not has_loss:
        raise ValueError(
            f"objective={name!r} weights output elements by the gradient of a loss: give loss, a function "
            "loss(output, batch), as well."
        )


def make_objective(name: str, layers: Sequence[QuantizedLayer]) -> Objective:
    """The objective registered as ``name``, for a unit of these layers. See ``register_objective``.

    Args:
        name: Name of the objective.
        layers: Layers of the unit.
    """
    return _OBJECTIVES[name](layers)


def check_layers(name: str, layers: Sequence[QuantizedLayer]) -> None:
    """Refuse an objective that makes no sense for a model.

    Args:
        name: Name of the objective.
        layers: All quantized layers of the model.

    Raises:
        ValueError: If it does not.

    Example:
        >>> check_layers("squared_error", [])
    """
    _OBJECTIVES[name].check_layers(layers)


def weighs_rows(name: str) -> bool:
    """Whether an objective weighs the rows of outputs, see ``Objective.row_weights``.

    Example:
        >>> weighs_rows("squared_error")
        False
    """
    return _OBJECTIVES[name].row_weights is not Objective.row_weights


@register_objective(SQUARED_ERROR)
class SquaredError(Objective):
    """Sum of squared differences, each times its weight (AdaQuant: Hubara et al. 2021, eq. 3).

    Example:
        >>> SquaredError().loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.5]))
        tensor(3.)
    """

    def loss(self, output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """See ``Objective``."""
        found: Tensor = _SquaredDifference.apply(output, target, weight)
        return found

    def power(self, target: Tensor, weight: Tensor | None) -> Tensor:
        """See ``Objective``."""
        squares = target.float().square()
        return (squares if weight is None else squares * weight.to(squares.device)).sum()


@register_objective(FISHER)
class FisherError(SquaredError):
    """Squared error whose weights are the squared gradients of a loss: the diagonal of the Fisher matrix (BRECQ: Li et
    al. 2021, eq. 10).

    Example:
        >>> check_objective("fisher", has_loss=True)
    """

    needs_loss = True


class _SquaredDifference(torch.autograd.Function):
    """Sum of weighted squared differences, without memory of its own: the target's is used up."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        difference = target.sub_(output) if target.dtype == torch.float32 else target.float().sub_(output)
        weighted = difference if weight is None else difference * weight
        ctx.save_for_backward(weighted)
        ctx.dtype = output.dtype
        return dot(weighted, difference)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weighted,) = ctx.saved_tensors
        return weighted.mul_(-2 * grad).to(ctx.dtype), None, None
