"""Adam (Kingma and Ba 2015) for few small tensors with a learning rate each.

``torch.optim.Adam`` computes the same, but its bookkeeping for each group of parameters takes longer than the
arithmetic, and as long as a small layer's forward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Optimiser that leaves out the parameters that have no gradient at a step.

    Args:
        parameters: Parameters to optimise.
        rates: Learning rate of each, a number or a tensor that has one for each of its elements.

    Example:
        >>> parameter = torch.zeros(1)
        >>> parameter.grad = torch.ones(1)
        >>> Adam([parameter], [0.5]).step(1.0)
        >>> parameter
        tensor([-0.5000])
    """

    def __init__(self, parameters: Sequence[Tensor], rates: Sequence[float | Tensor]) -> None:
        self.parameters, self.rates = list(parameters), list(rates)
        self._means = [torch.zeros_like(parameter) for parameter in parameters]
        self._squares = [torch.zeros_like(parameter) for parameter in parameters]
        self._steps = [0] * len(parameters)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take a step with ``factor`` times the learning rates, and forget the gradients."""
        chosen = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not chosen:
            return
        parameters = [self.parameters[i] for i in chosen]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means, squares = [self._means[i] for i in chosen], [self._squares[i] for i in chosen]
        torch._foreach_lerp_(means, gradients, 1 - _BETA1)
        torch._foreach_mul_(squares, _BETA2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - _BETA2)
        sizes, moves = [], []
        for i, mean in zip(chosen, means, strict=True):
            self._steps[i] += 1
            rate = self.rates[i]
            moves.append(mean * rate if isinstance(rate, Tensor) else mean)
            sizes.append(-factor * (1.0 if isinstance(rate, Tensor) else rate) / (1 - _BETA1 ** self._steps[i]))
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [(1 - _BETA2 ** self._steps[i]) ** 0.5 for i in chosen])
        torch._foreach_add_(denominators, _EPSILON)
        torch._foreach_addcdiv_(parameters, moves, denominators, sizes)
        for parameter in parameters:
            parameter.grad = None
