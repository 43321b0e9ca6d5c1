"""Probabilities of a float model with its own doubt: Monte Carlo dropout (Gal, Ghahramani 2016) and ensembles."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..batch_arguments import batch_arguments
from ..network.network import QuantizedNetwork
from .calibration_set import CalibrationSet
from .logits import class_axis, float_logits


def dropout_passes(
    network: QuantizedNetwork, calibration: CalibrationSet, samples: int, seed: int
) -> list[list[list[Tensor]]]:
    """Logits of the float model, pass by pass, with its dropout layers active and all others in evaluation mode.

    Args:
        network: Network with its float weights.
        calibration: Calibration set.
        samples: Number of passes; 0 for one without dropout.
        seed: Random seed; the global state of random numbers is left as it is found.

    Raises:
        ValueError: If the model has no active dropout layer (``nn.Dropout`` and its kinds, with p above 0).

    Example:
        See ``Utility``, whose option ``dropout_samples`` leads here.
    """
    if not samples:
        return [float_logits(network, calibration)]
    dropouts = [module for module in network.model.modules() if isinstance(module, _DropoutNd) and module.p > 0]
    if not dropouts:
        raise ValueError(
            f"dropout_samples={samples} needs dropout layers (nn.Dropout with p above 0), and the model has none: "
            "leave it out, or give an ensemble."
        )
    with _training(dropouts), torch.random.fork_rng():
        torch.manual_seed(seed)
        return [float_logits(network, calibration) for _ in range(samples)]


def ensemble_passes(
    network: QuantizedNetwork, calibration: CalibrationSet, members: Sequence[nn.Module]
) -> list[list[list[Tensor]]]:
    """Logits of further float models, member by member; each is in evaluation mode and on the batches' device then.

    Args:
        network: The network, whose device is taken.
        calibration: Calibration set, of which each member gets the batches as the model does: by its own
            ``calibration_step``, or as arguments of its ``forward``.
        members: The models.

    Example:
        See ``Utility``, whose option ``ensemble`` leads here.
    """
    device = next((parameter.device for parameter in network.model.parameters()), torch.device("cpu"))
    passes = []
    for member in members:
        present = [module for module in member.modules() if module.training]
        member.eval().to(device)
        try:
            passes.append(float_logits(network, calibration, _Member(member, calibration)))
        finally:
            for module in present:
                module.training = True
    return passes


class _Member:
    """How a batch goes through a member of an ensemble."""

    def __init__(self, model: nn.Module, calibration: CalibrationSet) -> None:
        self.model, self.calibration = model, calibration

    def __call__(self, index: int) -> Any:
        batch = self.calibration.batches[index]
        if (own := getattr(self.model, "calibration_step", None)) is not None:
            return own(batch, index)
        args, kwargs = batch_arguments(self.model, batch)
        return self.model(*args, **kwargs)


def mean_logits(passes: Sequence[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Logits of the mean of the probabilities of several passes; of outputs of one value, a single logit of the mean.

    Args:
        passes: For each pass, batch and output tensor, the logits.

    Raises:
        ValueError: If the passes give outputs of different shapes.

    Example:
        >>> certain, doubtful = torch.tensor([[0.0, 100.0]]), torch.tensor([[0.0, 0.0]])
        >>> mean_logits([[[certain]], [[doubtful]]])[0][0].softmax(1)
        tensor([[0.2500, 0.7500]])
    """
    return [[_mean(tensors) for tensors in zip(*of_batch, strict=True)] for of_batch in zip(*passes, strict=True)]


def _mean(logits: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(each.shape) for each in logits}
    if len(shapes) > 1:
        raise ValueError(
            f"The models of an ensemble give outputs of different shapes, {', '.join(map(str, sorted(shapes)))}: they "
            "must tell the same classes apart."
        )
    first, axis = logits[0], class_axis(logits[0])
    if first.dim() == 1 or first.shape[axis] == 1:
        return torch.stack([each.float().sigmoid() for each in logits]).mean(0).logit(1e-7)
    together = torch.stack([each.float().log_softmax(axis) for each in logits])
    return together.logsumexp(0) - torch.log(torch.tensor(float(len(logits))))


@contextmanager
def _training(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these modules are in training mode."""
    modes = [module.training for module in modules]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
