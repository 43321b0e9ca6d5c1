"""What decisions of the float model and of the quantized one cost on the same samples, and how they are confused."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ranks
from ..network.network import QuantizedNetwork
from .calibration_set import CalibrationSet
from .logits import float_logits
from .utility import Utility

BY_PROBABILITIES, BY_LABELS = "float probabilities", "labels"


@dataclass(frozen=True)
class Decisions:
    """What the decisions of both models cost on the same samples.

    Args:
        judged_by: What they are judged by: the float model's own probabilities, or labels.
        samples: Number of samples.
        costs: Mean cost of the float and of the quantized model's decisions, in the unit of the matrix.
        standard_error: Standard error of the difference, which is taken sample by sample; NaN of a single sample.
        accuracy: Share of the samples whose most probable class is the truth, of the float and the quantized model.
        changed: Share of the samples on which the quantized model decides otherwise than the float one.
        confusion: For either model, shares of the samples by decision (rows) and truth, which add up to 1; shape
            (2, classes, classes).

    Example:
        See ``expected_decisions``.
    """

    judged_by: str
    samples: int
    costs: tuple[float, float]
    standard_error: float
    accuracy: tuple[float, float]
    changed: float
    confusion: Tensor

    @property
    def rise(self) -> float:
        """Cost of the quantized model's decisions over that of the float one's."""
        return self.costs[1] - self.costs[0]


class Tally:
    """Sums over batches of what both models decide. Positions of a sample (of texts, of segmentations) are averaged.

    Args:
        utility: What mistakes cost.

    Example:
        >>> tally, logits = Tally(Utility([[0, 1], [10, 0]])), torch.tensor([[0.0, 1.0], [0.0, 3.0]])
        >>> tally.add(logits, -logits, torch.tensor([1, 1]))
        >>> found = tally.decisions("labels")
        >>> found.costs, found.accuracy, found.changed
        ((0.5, 1.0), (1.0, 0.0), 0.5)
    """

    def __init__(self, utility: Utility) -> None:
        self.utility = utility
        self._rows: list[Tensor] = []
        classes = len(utility.table)
        self._confusion = torch.zeros(2, classes, classes, dtype=torch.float64)

    def add(self, of_float: Tensor, of_quantized: Tensor, truth: Tensor, tokens: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            of_float: Logits of the float model, see ``Utility.probabilities``.
            of_quantized: Logits of the quantized model, same shape.
            truth: Classes, int64, shape (samples, ...), other numbers for what does not count (-100, say); or
                probabilities of the classes, shape (samples, ..., classes).
            tokens: Which tokens count, bool, shape (samples, positions), or which samples, such as nodes, shape
                (samples,); all if None.
        """
        utility = self.utility
        if tokens is not None and tokens.dim() == 1 and len(tokens) == len(of_float):
            of_float, of_quantized, truth = of_float[tokens], of_quantized[tokens], truth[tokens]
        probabilities = [utility.probabilities(logits) for logits in (of_float, of_quantized)]
        if not truth.is_floating_point():
            known = (truth >= 0) & (truth < len(utility.table))
            truth = torch.nn.functional.one_hot(truth.where(known, 0).long(), len(utility.table)) * known.unsqueeze(-1)
        truth = truth.to(probabilities[0])
        # Each sample weighs 1 in all, over the positions that count.
        counting = truth.sum(-1).round()
        if tokens is not None and of_float.dim() > 2 and counting.shape == tokens.shape:
            counting = counting * tokens
        number = counting.flatten(1).sum(1) if counting.dim() > 1 else counting
        weights = counting / number.clamp_min(1).view(-1, *[1] * (counting.dim() - 1))

        def mean(values: Tensor) -> Tensor:
            return (values * weights).reshape(len(weights), -1).sum(1)

        decisions = [utility.decide(each) for each in probabilities]
        judged = utility.expected_costs(truth)
        figures = [mean(judged.gather(-1, each.unsqueeze(-1)).squeeze(-1)) for each in decisions]
        figures += [mean(truth.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1)) for p in probabilities]
        figures.append(mean((decisions[0] != decisions[1]).to(truth)))
        self._rows.append(torch.stack(figures, 1)[number > 0].double().cpu())
        shares = (weights.unsqueeze(-1) * truth).reshape(-1, truth.shape[-1]).double().cpu()
        for confusion, decided in zip(self._confusion, decisions, strict=True):
            confusion.index_add_(0, decided.flatten().cpu(), shares)

    def decisions(self, judged_by: str) -> Decisions | None:
        """What was counted, by all ranks together; None if nothing was.

        Args:
            judged_by: ``"float probabilities"`` or ``"labels"``.
        """
        of_rank = torch.cat(self._rows) if self._rows else torch.zeros(0, 5, dtype=torch.float64)
        found = ranks.from_all((of_rank, self._confusion))
        rows, confusion = torch.cat([each for each, _ in found]), torch.stack([each for _, each in found]).sum(0)
        if not len(rows):
            return None
        mean = rows.mean(0).tolist()
        difference = rows[:, 1] - rows[:, 0]
        error = float(difference.std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        costs, accuracy = (mean[0], mean[1]), (mean[2], mean[3])
        return Decisions(judged_by, len(rows), costs, error, accuracy, mean[4], confusion / len(rows))


@torch.no_grad()
def expected_decisions(network: QuantizedNetwork, calibration: CalibrationSet, utility: Utility) -> Decisions:
    """What the decisions of the float and of the quantized model cost by the float model's own probabilities.

    Args:
        network: Calibrated network with its float weights.
        calibration: Calibration set; no labels are needed.
        utility: What mistakes cost, and whose probabilities are the float model's (dropout, an ensemble).

    Raises:
        ValueError: If the matrix does not fit the model's outputs.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Linear(2, 2)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(8, 2))
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=2, edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> expected_decisions(network, calibration, Utility([[0, 1], [1, 0]])).rise >= 0
        True
    """
    calibration.require()
    targets, tally = utility.targets(network, calibration), Tally(utility)
    of_float = float_logits(network, calibration)
    for index in range(len(calibration)):
        output, tokens = calibration.run(index), calibration.tokens(index)
        plain, judging = (utility.compared(output, each[index], tokens) for each in (of_float, targets))
        for (logits, other, counts), (_, wanted, _) in zip(plain, judging, strict=True):
            tally.add(other, logits, utility.probabilities(wanted), counts)
    with ranks.alone():
        found = tally.decisions(BY_PROBABILITIES)
    assert found is not None
    return found
