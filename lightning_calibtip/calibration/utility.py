"""Utility: what each mistake costs, and which decision costs least (loss-calibrated inference: Cobb, Roberts, Gal 2018;
Vadera et al. 2021)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files.digest import digest
from ..network.network import QuantizedNetwork
from ..option_fields import check_names
from .calibration_set import CalibrationSet, named_logits
from .divergences import Divergence, draw_classes
from .logits import class_axis, float_logits, over_outputs, over_positions, paired_logits
from .predictive import dropout_passes, ensemble_passes, mean_logits

# By which share of the largest cost M is above it.
_ABOVE = 0.01

# Logarithm of the probability of a class that is ruled out.
_RULED_OUT = -1e4

# The share of the KL divergence in the divergence of decisions.
_OF_PROBABILITIES = 0.1

# Costs below this share of the largest are nothing.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Utility(Divergence):
    """What each mistake costs. A user takes the decision of least expected cost, ``h*(x) = argmin_h sum_c p(c|x)
    cost(h, c)``, and the quantized model is to cost as little as the float one.

    As the loss that the diagnosis and bit allocation report it is what the quantized model's decisions cost by the
    float model's own probabilities, in the unit of the matrix, so that no labels are needed. Bias tuning and AdaQuant's
    weights get the KL divergence from the float model plus ``-log(M - cost)``, M being 1 per cent above the largest
    cost. Decisions are soft in these, with chances ``softmax(-cost(h) / T)``, so that samples that hardly decide
    otherwise count in part. Bit allocation chooses by a divergence of decisions (``DecisionDivergence``): the cost
    itself turns on few samples, and a choice among many alternatives would fit those.

    Args:
        matrix: ``matrix[decision][truth]`` is what a decision costs where the truth is that class, shape (classes,
            classes), in any unit; finite numbers of at least 0.
        cost: Function ``cost(decision, truth)`` of two classes, in place of ``matrix``, which then takes what it gives
            for each pair.
        classes: Number of classes that ``cost`` is asked about.
        temperature: T, as a share of the largest cost, above 0: how far two decisions must be apart in cost for the
            one to be taken for certain.
        dropout_samples: Number of passes through the float model with its dropout layers active whose probabilities
            are averaged (Monte Carlo dropout; Gal, Ghahramani 2016); 0 for one pass without dropout.
        ensemble: Further float models of the same outputs, whose probabilities are averaged with the float model's.
        seed: Random seed of dropout.

    Raises:
        ValueError: If the matrix is not square, has a negative, infinite or NaN cost, fewer than two classes, or lets
            all decisions cost the same; if both or neither of ``matrix`` and ``cost`` are given; or an option is out of
            its range. The message says which.

    Example:
        >>> utility = Utility([[0, 1], [10, 0]])  # deciding for 1 where the truth is 0 costs ten times as much
        >>> chances = torch.tensor([[0.2, 0.8], [0.05, 0.95]])
        >>> utility.expected_costs(chances)
        tensor([[0.8000, 2.0000],
                [0.9500, 0.5000]])
        >>> utility.decide(chances)
        tensor([0, 1])
        >>> Utility([[0, 1], [-10, 0]])
        Traceback (most recent call last):
        ...
        ValueError: Utility: matrix[1][0] is -10.0; costs must be finite numbers of at least 0. Count gains as costs \
that are avoided: subtract each from the greatest.
    """

    matrix: Sequence[Sequence[float]] | None = None
    cost: Callable[[int, int], float] | None = None
    classes: int | None = None
    temperature: float = 0.01
    dropout_samples: int = 0
    ensemble: Sequence[nn.Module] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        matrix = _checked(self._given())
        for name, value in (("matrix", matrix), ("cost", None), ("classes", len(matrix))):
            object.__setattr__(self, name, value)
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not number or not 0 < self.temperature < math.inf:
            raise ValueError(f"Utility: temperature must be a finite number above 0, got {self.temperature!r}.")
        for name in ("dropout_samples", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"Utility: {name} must be an integer of at least 0, got {value!r}.")
        if isinstance(self.ensemble, nn.Module):
            raise ValueError("Utility: ensemble must be a list of models, got one model: give [model].")
        object.__setattr__(self, "ensemble", tuple(self.ensemble))
        for member in self.ensemble:
            if not isinstance(member, nn.Module):
                raise ValueError(f"Utility: ensemble must hold modules, got a {type(member).__name__}.")

    def _given(self) -> Any:
        if (self.matrix is None) == (self.cost is None):
            raise ValueError("Utility: give either matrix or cost, a function cost(decision, truth).")
        if self.cost is None:
            if self.classes is not None and len(self.matrix) != self.classes:  # type: ignore[arg-type]
                raise ValueError(
                    f"Utility: matrix has {len(self.matrix)} rows, and classes is {self.classes}."  # type: ignore[arg-type]
                )
            return self.matrix
        if not callable(self.cost):
            raise ValueError(f"Utility: cost must be a function cost(decision, truth), got {self.cost!r}.")
        if isinstance(self.classes, bool) or not isinstance(self.classes, int):
            raise ValueError(
                f"Utility: cost needs classes, the number of classes that it is asked about, got {self.classes!r}."
            )
        return [[self.cost(h, c) for c in range(self.classes)] for h in range(self.classes)]

    @property
    def name(self) -> str:
        """``"cost"`` and the first digits of a digest of everything that the loss depends on."""
        known = (self.matrix, self.temperature, self.dropout_samples, self.ensemble, self.seed)
        return f"cost#{digest(known)[:8]}"

    @cached_property
    def table(self) -> Tensor:
        """The costs, float32, shape (decisions, classes)."""
        return torch.tensor(self.matrix, dtype=torch.float32)

    @property
    def bound(self) -> float:
        """M, just above the largest cost."""
        return float(self.table.max()) * (1 + _ABOVE)

    def check_logits(self, logits: Sequence[tuple[str, Tensor]]) -> None:
        """Refuse a model without an output of so many classes; see ``Divergence``."""
        if not any(self._fits(each) for _, each in logits):
            found = ", ".join(f"{name or 'an output'} of shape {tuple(each.shape)}" for name, each in logits)
            raise ValueError(
                f"Utility: the matrix has {len(self.table)} classes, and the model gives {found}: a matrix needs a row "
                "and a column for each class that the model tells apart."
            )

    def _fits(self, logits: Tensor) -> bool:
        return len(self.table) == (2 if _is_single(logits) else logits.shape[class_axis(logits)])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes from logits, classes last.

        Args:
            logits: Shape (samples, classes), (samples, positions, classes), or (samples, classes, height, width); or
                single logits of the second of two classes, shape (samples,) or with one class in place of several.

        Returns:
            Float32, shape (samples, ..., classes).
        """
        return self.log_probabilities(logits).exp()

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Logarithms of ``probabilities``, at least -10,000, so that a class that is ruled out makes no NaN.

        Args:
            logits: See ``probabilities``.

        Returns:
            Float32, shape (samples, ..., classes).
        """
        if _is_single(logits):
            second = logits.float() if logits.dim() == 1 else logits.float().squeeze(class_axis(logits))
            return F.logsigmoid(torch.stack([-second, second], -1)).clamp_min(_RULED_OUT)
        return logits.float().movedim(class_axis(logits), -1).log_softmax(-1).clamp_min(_RULED_OUT)

    def expected_costs(self, probabilities: Tensor) -> Tensor:
        """What each decision is expected to cost, ``sum_c p(c|x) cost(h, c)``.

        Args:
            probabilities: Shape (..., classes).

        Returns:
            Shape (..., decisions).
        """
        return probabilities @ self.table.to(probabilities).T

    def decide(self, probabilities: Tensor) -> Tensor:
        """The decisions of least expected cost; of equal ones the first.

        Args:
            probabilities: Shape (..., classes).

        Returns:
            Classes, int64, shape (...).
        """
        return self.expected_costs(probabilities).argmin(-1)

    def soft_costs(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """What soft decisions by some logits are expected to cost by the probabilities of others.

        Args:
            logits: Logits by which decisions are taken, see ``probabilities``.
            wanted: Logits by whose probabilities they are judged, same shape.

        Returns:
            Costs, shape (samples, ...).
        """
        judged = self.expected_costs(self.probabilities(wanted))
        return (self.log_chances(logits).exp() * judged).sum(-1)

    def log_chances(self, logits: Tensor) -> Tensor:
        """Logarithms of the chances of soft decisions.

        Args:
            logits: Logits by which decisions are taken, see ``probabilities``.

        Returns:
            Shape (samples, ..., decisions).
        """
        costs = self.expected_costs(self.probabilities(logits))
        return (-costs / (self.temperature * float(self.table.max()))).log_softmax(-1)

    def predictor(self) -> Divergence:
        """The divergence of decisions, see ``DecisionDivergence``."""
        return DecisionDivergence(self)

    def of_samples(self, output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
        """What the decisions are expected to cost by the float model's probabilities; see ``Divergence``."""
        found = [
            over_positions(self.soft_costs(logits, wanted), counts, logits)
            for logits, wanted, counts in self.compared(output, target, tokens)
        ]
        return over_outputs(found)

    def training_loss(self, output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
        """KL divergence from the float probabilities, plus ``-log(M - cost)``; see ``Divergence``."""
        found = []
        for logits, wanted, counts in self.compared(output, target, tokens):
            ours, theirs = self.log_probabilities(logits), self.log_probabilities(wanted)
            lost = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
            found.append(over_positions(lost + self._weight(self.soft_costs(logits, wanted)), counts, logits))
        return over_outputs(found)

    def probe(self, output: Any, target: list[Tensor], tokens: Tensor | None, generator: torch.Generator) -> Tensor:
        """Cross entropy of classes that are drawn from the float probabilities, plus ``-log(M - cost)`` of the float
        model's decision by the model's own probabilities, the loss of Cobb et al. (2018); see ``Divergence``."""
        found = []
        for logits, wanted, counts in self.compared(output, target, tokens):
            ours, theirs = self.probabilities(logits), self.probabilities(wanted)
            decided = self.decide(theirs).unsqueeze(-1)
            cost = self.expected_costs(ours).gather(-1, decided).squeeze(-1)
            drawn = draw_classes(theirs, generator).unsqueeze(-1)
            lost = self._weight(cost) - self.log_probabilities(logits).gather(-1, drawn).squeeze(-1)
            found.append(over_positions(lost, counts, logits).sum())
        return torch.stack(found).sum()

    def _weight(self, cost: Tensor) -> Tensor:
        return -(self.bound - cost).log()

    def compared(
        self, output: Any, target: list[Tensor], tokens: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Those of the model's outputs that tell as many classes apart as the matrix has.

        Args:
            output: Output of the quantized model for a batch.
            target: Float output tensors of the same batch.
            tokens: Which tokens count, bool, shape (samples, positions); all if None.

        Returns:
            For each, the logits, the float ones, and which tokens count.

        Raises:
            ValueError: If there is none.
        """
        pairs = [
            (logits, wanted, counts)
            for _, logits, wanted, counts in paired_logits(output, target, tokens)
            if self._fits(logits)
        ]
        if not pairs:
            self.check_logits(named_logits(output))
        return pairs

    def targets(self, network: QuantizedNetwork, calibration: CalibrationSet) -> list[list[Tensor]]:
        """Logits of the float model, or those of the mean probabilities of dropout's passes and of the ensemble."""
        if not self.dropout_samples and not self.ensemble:
            return float_logits(network, calibration)
        passes = dropout_passes(network, calibration, self.dropout_samples, self.seed)
        return mean_logits([*passes, *ensemble_passes(network, calibration, self.ensemble)])


class DecisionDivergence(Divergence):
    """How far the quantized model has come from the float one in what its decisions depend on: a smooth loss, which
    falls and rises with every sample, where the expected cost moves only with the few whose decision turns.

    With chances ``r(h)`` of decisions in inverse proportion to their expected costs (of two classes: the model's own
    probabilities, moved so that they are even where the decision turns), it is ``KL(r float || r quantized)``, weighted
    by what the decision is about, the harmonic mean of the float model's expected costs as a share of the matrix'
    mean; plus a tenth of the KL divergence of the probabilities, without which rare samples would settle everything.

    Args:
        utility: What mistakes cost.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0]])
        >>> DecisionDivergence(Utility([[0, 1], [10, 0]])).of_samples(logits, [logits])
        tensor([0.])
    """

    def __init__(self, utility: Utility) -> None:
        self.utility = utility

    @property
    def name(self) -> str:
        """``"decisions"`` and the digest of the utility's name."""
        return self.utility.name.replace("cost", "decisions")

    def check_logits(self, logits: Sequence[tuple[str, Tensor]]) -> None:
        """See ``Utility``."""
        self.utility.check_logits(logits)

    def targets(self, network: QuantizedNetwork, calibration: CalibrationSet) -> list[list[Tensor]]:
        """See ``Utility``."""
        return self.utility.targets(network, calibration)

    def of_samples(self, output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
        """See ``Divergence``."""
        found = []
        for logits, wanted, counts in self.utility.compared(output, target, tokens):
            ours, theirs = (self.utility.log_probabilities(each) for each in (logits, wanted))
            (by_ours, _), (by_theirs, stake) = self._log_chances(ours.exp()), self._log_chances(theirs.exp())
            turned = F.kl_div(by_ours, by_theirs, reduction="none", log_target=True).sum(-1)
            lost = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
            found.append(over_positions(stake * turned + _OF_PROBABILITIES * lost, counts, logits))
        return over_outputs(found)

    def _log_chances(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the chances of decisions, and the mean cost by these chances over the matrix' mean."""
        table = self.utility.table
        costs = self.utility.expected_costs(probabilities)
        chances = (-(costs + _NOTHING * float(table.max())).log()).log_softmax(-1)
        return chances, (chances.exp() * costs).sum(-1) / float(table.mean())


def with_utility(value: Any, option: str) -> Any:
    """A mapping of the fields of ``Utility``, as YAML gives it, as a ``Utility``; anything else as it is.

    Args:
        value: Value of an option.
        option: Name of the option, for messages.

    Raises:
        TypeError: If a name is none of the fields.
        ValueError: If ``Utility`` refuses a value.

    Example:
        >>> with_utility({"matrix": [[0, 1], [10, 0]]}, "metric").matrix
        ((0.0, 1.0), (10.0, 0.0))
        >>> with_utility("kl", "metric")
        'kl'
    """
    if not isinstance(value, Mapping):
        return value
    check_names(Utility, value, option)
    return Utility(**value)


def _is_single(logits: Tensor) -> bool:
    """Whether there is one logit in the place of those of several classes."""
    return logits.dim() == 1 or logits.shape[class_axis(logits)] == 1


def _checked(matrix: Any) -> tuple[tuple[float, ...], ...]:
    """The matrix as tuples of numbers."""
    rows = matrix.tolist() if hasattr(matrix, "tolist") else matrix
    try:
        found = tuple(tuple(float(cost) for cost in row) for row in rows)
    except (TypeError, ValueError):
        raise ValueError(f"Utility: matrix must be a list of rows of numbers, got {matrix!r}.") from None
    lengths = [len(row) for row in found]
    if len(found) < 2 or any(length != len(found) for length in lengths):
        shape = f"rows of {', '.join(map(str, sorted(set(lengths))))} costs" if found else "no rows"
        raise ValueError(
            f"Utility: matrix must be square, matrix[decision][truth] for two or more classes, got {len(found)} rows "
            f"({shape})."
        )
    for decision, row in enumerate(found):
        for truth, cost in enumerate(row):
            if not 0 <= cost <= torch.finfo(torch.float32).max:
                raise ValueError(
                    f"Utility: matrix[{decision}][{truth}] is {cost}; costs must be finite numbers of at least 0. "
                    "Count gains as costs that are avoided: subtract each from the greatest."
                )
    table = torch.tensor(found, dtype=torch.float32)
    if bool((table == table[0]).all()):
        raise ValueError("Utility: all rows of the matrix are alike, so that every decision costs the same.")
    return found
