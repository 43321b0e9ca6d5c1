"""Divergences: what a quantized model's outputs have lost of the float model's, sample by sample; each registered by
name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.network import QuantizedNetwork
from .calibration_set import CalibrationSet, named_logits
from .logits import (
    POSITION_LOGITS,
    class_axis,
    float_logits,
    over_outputs,
    over_positions,
    paired_logits,
    sample_divergences,
)

_DIVERGENCES: dict[str, type["Divergence"]] = {}


class Divergence(ABC):
    """An unlabelled loss: how far outputs of a quantized model are from what the float model says of the same samples.

    Bit allocation and the diagnosis measure ``of_samples``; bias tuning minimises ``training_loss``; AdaQuant weights
    the elements of units' outputs by the squared gradient of ``probe`` at the float model.

    Example:
        See ``register_divergence``.
    """

    @property
    def name(self) -> str:
        """Name in tables and messages, the same in every process."""
        return next((name for name, kind in _DIVERGENCES.items() if kind is type(self)), type(self).__name__)

    def check_logits(self, logits: Sequence[tuple[str, Tensor]]) -> None:
        """Refuse, on the first batch, a model whose outputs cannot be compared in this way.

        Args:
            logits: Names and tensors of the model's output for a batch, see ``named_logits``; their shapes count.

        Raises:
            ValueError: If the divergence is for others; the message says for which.
        """
        return None

    def targets(self, network: QuantizedNetwork, calibration: CalibrationSet) -> list[list[Tensor]]:
        """What the float model says of each batch: its logits, see ``float_logits``.

        Args:
            network: Network with its float weights.
            calibration: Calibration set.

        Returns:
            For each batch, a list of tensors like those of the model's output.
        """
        return float_logits(network, calibration)

    @abstractmethod
    def of_samples(self, output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
        """What each sample has lost, less being better.

        Args:
            output: Output of the quantized model for a batch.
            target: From ``targets``, of the same batch.
            tokens: Which tokens count, bool, shape (samples, positions); all if None.

        Returns:
            Losses, float32, shape (samples,).
        """

    def predictor(self) -> "Divergence":
        """The divergence by which bit allocation predicts and compares choices, whose loss it then reports: this one,
        but where it moves with so few samples that a choice among many would fit these.
        """
        return self

    def training_loss(self, output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
        """What is minimised in the place of ``of_samples`` where that has no useful gradient: the same by default.

        Args:
            output: See ``of_samples``.
            target: See ``of_samples``.
            tokens: See ``of_samples``.

        Returns:
            Losses, float32, shape (samples,), differentiable.
        """
        return self.of_samples(output, target, tokens)

    def probe(self, output: Any, target: list[Tensor], tokens: Tensor | None, generator: torch.Generator) -> Tensor:
        """A loss whose squared gradient, at the float model, is an estimate of the diagonal of the divergence's
        curvature; the gradient of the divergence itself is 0 there.

        Args:
            output: Output of the float model for a batch.
            target: From ``targets``, of the same batch.
            tokens: Which tokens count, see ``of_samples``.
            generator: Source of random numbers, on the CPU.

        Returns:
            A scalar.

        Raises:
            ValueError: If this divergence has none.
        """
        raise ValueError(f"The divergence {self.name!r} cannot weight reconstruction: it has no method probe.")


class FirstOutput:
    """What is kept of a model's output for the first batch: shapes of its logits, or why there are none.

    Args:
        output: The output.

    Example:
        >>> FirstOutput(torch.zeros(2, 3)).require()
    """

    def __init__(self, output: Any) -> None:
        self._error: TypeError | None = None
        self._logits: list[tuple[str, Tensor]] = []
        try:
            self._logits = [(name, logits.detach().to("meta")) for name, logits in named_logits(output)]
        except TypeError as error:
            self._error = error

    def require(self, divergence: Divergence | None = None) -> None:
        """Raise unless there are logits that can be compared.

        Args:
            divergence: By what they are to be compared; None for any.

        Raises:
            TypeError: If the output holds no logits.
            ValueError: If these are not those that the divergence is for.
        """
        if self._error is not None:
            raise self._error
        if divergence is not None:
            divergence.check_logits(self._logits)


def register_divergence(name: str) -> Callable[[type[Divergence]], type[Divergence]]:
    """Class decorator that makes a ``Divergence`` available by a name: ``BitAllocation(metric=name)``,
    ``BiasTuning(divergence=name)``, ``AdaQuant(loss=name)``, ``Diagnosis(loss=name)``.

    Args:
        name: Name of the divergence; the class is made without arguments.

    Example:
        >>> @register_divergence("disagreement")
        ... class Disagreement(Divergence):
        ...     def of_samples(self, output, target, tokens=None):
        ...         return (output.argmax(1) != target[0].argmax(1)).float()
        >>> divergence_of("disagreement").of_samples(torch.eye(2), [torch.tensor([[1.0, 0.0], [1.0, 0.0]])])
        tensor([0., 1.])
    """

    def register(kind: type[Divergence]) -> type[Divergence]:
        _DIVERGENCES[name] = kind
        return kind

    return register


def check_divergence(value: Any, option: str, others: str = "") -> None:
    """Raise ``ValueError`` unless a value is a divergence or the name of one.

    Args:
        value: The value.
        option: Name of the option, for the message.
        others: What else is allowed, for the message.

    Example:
        >>> check_divergence("kl", "divergence")
    """
    if not isinstance(value, Divergence) and (not isinstance(value, str) or value not in _DIVERGENCES):
        raise ValueError(f"{option} must be {', '.join(_DIVERGENCES)}, a Utility{others}, got {value!r}.")


def divergence_of(value: str | Divergence | Mapping[str, Any]) -> Divergence:
    """The divergence of a name; one that is given is returned as it is.

    Args:
        value: Name or divergence, see ``check_divergence``.

    Example:
        >>> divergence_of("kl").name
        'kl'
    """
    assert not isinstance(value, Mapping), "options make a Utility of a mapping"
    return value if isinstance(value, Divergence) else _DIVERGENCES[value]()


@register_divergence("kl")
class KullbackLeibler(Divergence):
    """KL divergence to the float logits, in nats; see ``sample_divergences``.

    Example:
        >>> KullbackLeibler().of_samples(torch.tensor([[0.0, 1.0]]), [torch.tensor([[0.0, 1.0]])])
        tensor([0.])
    """

    def of_samples(self, output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
        """See ``Divergence``."""
        return sample_divergences(output, target, tokens)

    def probe(self, output: Any, target: list[Tensor], tokens: Tensor | None, generator: torch.Generator) -> Tensor:
        """Cross entropy of classes that are drawn from the float model's own probabilities: the Fisher matrix."""
        total = torch.zeros((), device=target[0].device)
        for name, logits, wanted, counts in paired_logits(output, target, tokens):
            axis = class_axis(logits)
            if logits.dim() == 1 or logits.shape[axis] == 1:
                noise = torch.randn(logits.shape, generator=generator).to(logits)
                total = total + (noise * logits).sum() / wanted.square().mean().clamp_min(1e-12).sqrt()
                continue
            chances = wanted.float().movedim(axis, -1).softmax(-1)
            if counts is not None and name.startswith(POSITION_LOGITS) and counts.shape == logits.shape:
                chances = chances * counts
            drawn = draw_classes(chances, generator)
            lost = F.cross_entropy(logits.float().movedim(axis, -1).flatten(0, -2), drawn.flatten(), reduction="none")
            total = total + over_positions(lost.view(drawn.shape), counts, logits).sum()
        return total


@register_divergence("mse")
class RelativeSquaredError(Divergence):
    """Mean squared difference from the float outputs, over their mean square in the batch.

    Example:
        >>> RelativeSquaredError().of_samples(torch.tensor([[1.0], [2.0]]), [torch.tensor([[1.0], [1.0]])])
        tensor([0., 1.])
    """

    def of_samples(self, output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
        """See ``Divergence``."""
        found = []
        for name, logits, wanted, counts in paired_logits(output, target, tokens):
            weight = _counting(name, wanted, counts)
            # What does not count may be NaN.
            ours, theirs = (each.float().where(weight > 0, 0) for each in (logits, wanted))
            error, power = (each.square().reshape(len(wanted), -1).sum(1) for each in (ours - theirs, theirs))
            found.append(error / power.mean().clamp_min(1e-20))
        return over_outputs(found)

    def probe(self, output: Any, target: list[Tensor], tokens: Tensor | None, generator: torch.Generator) -> Tensor:
        """The outputs times independent normal numbers: all directions weigh alike."""
        total = torch.zeros((), device=target[0].device)
        for name, logits, wanted, counts in paired_logits(output, target, tokens):
            noise = torch.randn(logits.shape, generator=generator).to(logits.device) * _counting(name, wanted, counts)
            scale = wanted.float().square().mean().clamp_min(1e-20).sqrt()
            total = total + (noise * logits.float()).sum() / scale
        return total


def _counting(name: str, wanted: Tensor, tokens: Tensor | None) -> Tensor:
    """Which elements of an output count, broadcastable to it."""
    if tokens is not None and tokens.dim() == 1 and len(tokens) == len(wanted):
        return tokens.view(-1, *[1] * (wanted.dim() - 1)).to(wanted.device, torch.float32)
    by_token = wanted.dim() > 2 or name.startswith(POSITION_LOGITS)
    if tokens is None or not by_token or wanted.shape[:2] != tokens.shape:
        return wanted.new_ones([1] * wanted.dim())
    return tokens.view(*tokens.shape, *[1] * (wanted.dim() - 2)).to(wanted.device, torch.float32)


def draw_classes(chances: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class from each row of probabilities.

    Args:
        chances: Probabilities, or multiples of them, shape (..., classes).
        generator: Source of random numbers, on the CPU.

    Returns:
        Classes, int64, shape (...), on the device of ``chances``.

    Example:
        >>> draw_classes(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.Generator().manual_seed(0))
        tensor([1, 0])
    """
    rows = chances.detach().flatten(0, -2).cpu()
    return torch.multinomial(rows, 1, generator=generator).view(chances.shape[:-1]).to(chances.device)
