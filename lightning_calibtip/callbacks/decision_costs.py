"""DecisionCosts: what the decisions of the float and of the quantized model cost, for the report."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from ..batches import object_in
from ..calibration.calibration_set import named_logits
from ..calibration.decisions import BY_LABELS, Decisions, Tally, expected_decisions
from ..calibration.utility import Utility, with_utility
from ..module import QuantizationModule
from ..report.decisions import decision_items
from .outcome import decisions_outcome
from .stage import Stage, StageResult

# Names under which mappings have labels.
_LABELS = ("labels", "label", "targets", "target", "y")


class DecisionCosts(Stage):
    """Reports what decisions cost, and how they are confused, float against quantized: expected by the float model's
    own probabilities on the calibration samples, and realised by the labels of the validation data, where it has some.

    It changes nothing and comes last; ``decisions`` holds what was found. Labels are the last element of a batch that
    is a tuple or list, or the entry ``labels`` (``label``, ``target``, ``y``) of a mapping or attribute of a batch:
    integers from 0 on, one for each sample (or position). Validation data are those of ``quantize`` or ``CalibTIP``.

    Args:
        utility: What mistakes cost, or a mapping of the fields of ``Utility``.

    Raises:
        TypeError: If it is neither.
        ValueError: If a field is out of its range.

    Example:
        >>> DecisionCosts({"matrix": [[0, 1], [10, 0]]}).utility.table
        tensor([[ 0.,  1.],
                [10.,  0.]])
    """

    compares_logits = True

    def __init__(self, utility: Utility | Mapping[str, Any]) -> None:
        super().__init__()
        utility = with_utility(utility, f"{self.name}: utility")
        if not isinstance(utility, Utility):
            raise TypeError(f"{self.name}: utility must be a Utility or a mapping of its fields, got {utility!r}.")
        self.utility = self.divergence = utility
        self.decisions: list[Decisions] = []

    @override
    def run(self, module: QuantizationModule) -> StageResult:
        """Count on calibration samples and, where there are any, on validation samples."""
        self.decisions = [expected_decisions(module.network, module.calibration, self.utility)]
        if self.watch_validation is not None:
            observer = _LabelledDecisions(self.utility)
            self.watch_validation(observer)
            realised = observer.tally.decisions(BY_LABELS)
            self.decisions += [] if realised is None else [realised]
        figures: dict[str, float] = {}
        for found, prefix in zip(self.decisions, ("expected", "realised"), strict=False):
            figures |= {f"{prefix}_cost_float": found.costs[0], f"{prefix}_cost": found.costs[1]}
        items = decision_items(self.decisions, self.utility)
        return StageResult(figures, items, decisions_outcome(self.decisions))


class _LabelledDecisions(pl.Callback):
    """Counts decisions of the float and of the quantized model while the user's validation runs."""

    def __init__(self, utility: Utility) -> None:
        self.tally = Tally(utility)
        self._labels: Tensor | None = None

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each validation batch, from which the user's step may take the labels out."""
        self._labels = labels_of(batch)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after each validation batch: both models pass it once more."""
        assert isinstance(pl_module, QuantizationModule)
        labels = self._labels
        if labels is None:
            return
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            quantized = pl_module.calibration_step(batch, batch_idx)
            with pl_module.quantized(False):
                of_float = [logits for _, logits in named_logits(pl_module.calibration_step(batch, batch_idx))]
        # Of a graph with a mask for each split, the nodes for validation are judged by their labels.
        tokens = getattr(object_in(batch), "val_mask", None)
        tokens = pl_module.token_mask(batch) if tokens is None else tokens
        for logits, other, counts in self.tally.utility.compared(quantized, of_float, tokens):
            wanted = self.tally.utility.probabilities(logits).shape[:-1]
            # Labels may have a dimension of one class, as single logits have.
            if [size for size in labels.shape if size != 1] == [size for size in wanted if size != 1]:
                self.tally.add(other, logits, labels.reshape(wanted).to(logits.device), counts)


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch; None where it has none.

    Args:
        batch: Any batch, see ``DecisionCosts``.

    Example:
        >>> labels_of((torch.zeros(2, 3), torch.tensor([1, 0])))
        tensor([1, 0])
        >>> labels_of(torch.zeros(2, 3)) is None
        True
    """
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in _LABELS if name in batch), None)
    elif isinstance(batch, tuple | list):
        found = batch[-1] if len(batch) > 1 else None
    else:
        found = next((getattr(batch, name) for name in _LABELS if hasattr(batch, name)), None)
    if not isinstance(found, Tensor) or found.is_complex():
        return None
    # Binary cross entropy wants its labels as floats.
    is_whole = not found.is_floating_point() or bool((found == found.round()).all())
    return found.long() if is_whole else None
