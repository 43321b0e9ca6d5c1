"""What became of a stage, in sentences for the report."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from ..allocation.outcome import Point
from ..calibration.decisions import BY_LABELS, Decisions
from ..reconstruction.optimize import UnitResult


class Judged(Protocol):
    """Result of a stage that was judged by the divergence from the float model."""

    @property
    def divergence_before(self) -> float:
        """Divergence before the stage."""

    @property
    def divergence_after(self) -> float:
        """Divergence of the state that was kept."""

    @property
    def kept(self) -> bool:
        """Whether the change was kept."""

    @property
    def note(self) -> str:
        """Why it was not."""


def stage_outcome(subject: str, change: str, result: Judged) -> str:
    """Say whether what a stage has changed was kept, and why.

    Args:
        subject: What the stage changes, in the plural: ``"Biases"``.
        change: What it does to them: ``"tuned"``.
        result: Result of the stage.

    Example:
        >>> from lightning_calibtip.tuning.bias import BiasTuningResult
        >>> stage_outcome("Biases", "tuned", BiasTuningResult(0.5, 0.25, True))
        'Biases were tuned, and this was kept: the divergence from the float model fell from 0.5 to 0.25.'
        >>> stage_outcome("Biases", "tuned", BiasTuningResult(0.5, 0.5, False, "no layer has a bias"))
        'Biases were left as they were: no layer has a bias.'
    """
    if not result.kept:
        return f"{subject} were left as they were: {result.note}."
    fall = f"from {result.divergence_before:.4g} to {result.divergence_after:.4g}"
    return f"{subject} were {change}, and this was kept: the divergence from the float model fell {fall}."


def units_outcome(results: Sequence[UnitResult], at_candidates: bool = False) -> str:
    """Say how many units AdaQuant has kept, and what that did to their error.

    Args:
        results: Results of the units.
        at_candidates: Whether each unit was reconstructed once at every candidate bit-width.

    Example:
        >>> kept = UnitResult("conv1", ("conv1",), 0.5, 0.25, True, "", 1.5)
        >>> units_outcome([kept, UnitResult("conv2", ("conv2",), 0.5, 0.5, False, "the error did not fall", 1.5)])
        '1 of 2 units was kept, 1 restored to its state before; the mean error went from 0.5 to 0.375.'
    """
    kept = sum(result.kept for result in results)
    restored = len(results) - kept
    units = "reconstructions of units at candidate bit-widths" if at_candidates else "units"
    sentence = f"{kept} of {len(results)} {units} {'was' if kept == 1 else 'were'} kept"
    if restored:
        sentence += f", {restored} restored to {'its' if restored == 1 else 'their'} state before"
    errors = [(result.error_before, result.error_after) for result in results if math.isfinite(result.error_before)]
    if not errors:
        return f"{sentence}."
    before, after = (sum(of_units) / len(errors) for of_units in zip(*errors, strict=True))
    return f"{sentence}; the mean error went from {before:.4g} to {after:.4g}."


def decisions_outcome(found: Sequence[Decisions]) -> str:
    """Say what the decisions of the float and of the quantized model cost.

    Args:
        found: What was counted.

    Example:
        >>> import torch
        >>> found = Decisions("labels", 100, (0.5, 0.75), 0.1, (0.9, 0.8), 0.05, torch.zeros(2, 2, 2))
        >>> print(decisions_outcome([found]))
        By the labels of 100 samples a decision of the float model costs 0.5, one of the quantized model 0.75 (a change
        of 0.25, standard error 0.1); 5.0% of the decisions differ.
    """
    sentences = []
    for each in found:
        basis = "the labels" if each.judged_by == BY_LABELS else "the float model's own probabilities"
        sentences.append(
            f"By {basis} of {each.samples} samples a decision of the float model costs {each.costs[0]:.4g}, one of the "
            f"quantized model {each.costs[1]:.4g} (a change of {each.rise:.4g}, standard error "
            f"{each.standard_error:.4g}); {each.changed:.1%} of the decisions differ."
        )
    if all(each.judged_by != BY_LABELS for each in found):
        sentences.append("No validation batch had labels to judge by.")
    return " ".join(sentences)


def allocation_outcome(chosen: Point) -> str:
    """Say which bit-widths the layers got, and what that costs.

    Args:
        chosen: Point of the trade-off that was chosen.

    Example:
        >>> from lightning_calibtip.quantization.spec import BitWidths
        >>> allocation_outcome(Point("0.13", {"fc": BitWidths(4, 8)}, 0.125, 0.02, 0.03, {}))
        'Chosen: W4A8 for 1 layer; the loss rises by 0.03 (0.02 was predicted), weights take 12.5% of float32.'
    """
    counts = Counter(bits.label for bits in chosen.bits.values())
    choices = ", ".join(f"{label} for {count} layer{'s' * (count > 1)}" for label, count in sorted(counts.items()))
    predicted = "" if math.isnan(chosen.predicted_loss) else f" ({chosen.predicted_loss:.4g} was predicted)"
    sentence = (
        f"Chosen: {choices}; the loss rises by {chosen.measured_loss:.4g}{predicted}, weights take "
        f"{chosen.compression:.1%} of float32."
    )
    return sentence if chosen.proved else f"{sentence} The solver has not proved that no choice is better."
