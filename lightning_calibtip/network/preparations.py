"""The registry of preparations: what makes the insides of modules that compute by themselves visible as layers.

Attention, recurrent layers and message passing compute from tensors that no module of their own reads. Each such kind
of module has a preparation, which gives these tensors modules.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn


class Preparation:
    """Gives modules to what some kind of module computes inside; subclasses override what they need.

    None of the methods may change what the model computes.

    Example:
        >>> class Doubling(Preparation):
        ...     def float_part(self, module):
        ...         return "its factor stays float" if type(module).__name__ == "Double" else ""
        >>> register_preparation(Doubling())
        >>> class Double(nn.Module):
        ...     pass
        >>> float_part(Double()), float_part(nn.ReLU())
        ('its factor stays float', '')
    """

    def prepare(self, model: nn.Module) -> None:
        """Change a model, in place, as far as that needs no batch.

        Args:
            model: The float model.
        """

    def settle(self, model: nn.Module, run: Callable[[], Any]) -> None:
        """Change a prepared model, in place, as running it shows.

        Args:
            model: The float model, in eval mode.
            run: Calls it once, on one batch, and returns its output.
        """

    def restore(self, model: nn.Module, layers: Collection[str]) -> None:
        """Change a prepared model, in place, as ``settle`` would, by the layers that a plan names.

        Args:
            model: The float model.
            layers: Full names of the layers of the plan.
        """

    def possible_names(self, model: nn.Module) -> list[str]:
        """Full names of the layers that it may add to a model which has not run."""
        return []

    def float_part(self, module: nn.Module) -> str:
        """What stays float of a module that it has prepared; ``""`` for other modules."""
        return ""


_PREPARATIONS: list[Preparation] = []


def register_preparation(preparation: Preparation) -> None:
    """Let all models that are quantized from now on be prepared by ``preparation``, after those that are known.

    Example:
        See ``Preparation``.
    """
    _PREPARATIONS.append(preparation)


def preparations() -> tuple[Preparation, ...]:
    """All preparations, in the order of registration.

    Example:
        >>> from lightning_calibtip.network import network
        >>> "AttentionPreparation" in [type(preparation).__name__ for preparation in preparations()]
        True
    """
    return tuple(_PREPARATIONS)


def float_part(module: nn.Module) -> str:
    """What stays float of a module whose insides are layers, by the preparation that knows; ``""`` for others.

    Example:
        See ``Preparation``.
    """
    return next((reason for each in _PREPARATIONS if (reason := each.float_part(module))), "")
