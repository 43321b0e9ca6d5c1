"""What decisions cost and how they are confused, float against quantized."""

from collections.abc import Sequence
from typing import Any

from ..calibration.decisions import Decisions
from ..calibration.utility import Utility
from .item import ReportItem

# A matrix of more classes is listed by its dearest pairs instead.
_MOST_CLASSES = 20
_PAIRS = 100

WHAT_COSTS_ARE = (
    "Cost is the mean over the samples of what the decision of least expected cost costs, in the unit of the matrix: "
    "expected by the float model's own probabilities on calibration samples, or realised by the labels of validation "
    "samples. The standard error is that of the change, sample by sample. Changed is the share of samples on which the "
    "quantized model decides otherwise. Accuracy is that of the most probable class, which need not be the decision."
)
_WHAT_CONFUSION_IS = "Shares of the samples by the decision that is taken and the truth, as judged by the {judged_by}."


def decision_items(found: Sequence[Decisions], utility: Utility) -> list[ReportItem]:
    """The costs of decisions, and a confusion matrix for each way of judging them.

    Args:
        found: What was counted, see ``Decisions``.
        utility: What mistakes cost.

    Example:
        >>> import torch
        >>> chances = torch.tensor([[[0.5, 0.0], [0.0, 0.5]], [[0.5, 0.25], [0.0, 0.25]]])
        >>> decisions = Decisions("labels", 4, (0.0, 0.25), 0.25, (1.0, 0.75), 0.25, chances)
        >>> costs, confusion = decision_items([decisions], Utility([[0, 1], [10, 0]]))
        >>> costs.name, confusion.name
        ('decision_costs', 'confusion_labels')
        >>> print(confusion.text)
        model      decision  truth 0  truth 1
        ---------  --------  -------  -------
        float             0      0.5        0
        float             1        0      0.5
        quantized         0      0.5     0.25
        quantized         1        0     0.25
    """
    columns = (
        "judged by", "samples", "cost, float", "cost, quantized", "change", "standard error", "changed",
        "accuracy, float", "accuracy, quantized",
    )  # fmt: skip
    rows = [
        [each.judged_by, each.samples, *each.costs, each.rise, each.standard_error, each.changed, *each.accuracy]
        for each in found
    ]
    title = "What decisions cost"

    def draw() -> Any:
        return draw_costs(found)

    items = [ReportItem("decision_costs", title, columns, rows, draw, note=WHAT_COSTS_ARE)]
    return [*items, *(_confusion_item(each, utility) for each in found)]


def _confusion_item(found: Decisions, utility: Utility) -> ReportItem:
    name = f"confusion_{found.judged_by.split()[-1]}"
    title, note = (
        f"Decisions and the truth, by the {found.judged_by}",
        _WHAT_CONFUSION_IS.format(judged_by=found.judged_by),
    )

    def draw() -> Any:
        return draw_confusion(found)

    models = ("float", "quantized")
    if len(utility.table) <= _MOST_CLASSES:
        columns = ["model", "decision", *(f"truth {truth}" for truth in range(len(utility.table)))]
        rows = [
            [model, decision, *shares]
            for model, confusion in zip(models, found.confusion.tolist(), strict=True)
            for decision, shares in enumerate(confusion)
        ]
        return ReportItem(name, title, columns, rows, draw, note=note)
    change = (found.confusion[1] - found.confusion[0]) * utility.table.double()
    order = change.abs().flatten().argsort(descending=True)[:_PAIRS].tolist()
    pairs = [divmod(place, len(utility.table)) for place in order]
    rows = [
        [h, c, float(utility.table[h, c]), *found.confusion[:, h, c].tolist(), float(change[h, c])] for h, c in pairs
    ]
    columns = ["decision", "truth", "cost", "share, float", "share, quantized", "change of the mean cost"]
    return ReportItem(name, title, columns, rows, draw, note=f"{note} Those that change the mean cost most.")


def draw_costs(found: Sequence[Decisions]) -> Any:
    """Draw what decisions of either model cost, with the standard error of the change.

    Args:
        found: What was counted.

    Returns:
        A matplotlib figure.

    Example:
        >>> len(draw_costs([]).axes)
        1
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.2 + 0.8 * len(found)), layout="constrained")
    axes = figure.subplots()
    places = range(len(found))
    axes.barh([place - 0.2 for place in places], [each.costs[0] for each in found], 0.4, label="float")
    errors = [each.standard_error if each.samples > 1 else 0.0 for each in found]
    quantized = [each.costs[1] for each in found]
    axes.barh([place + 0.2 for place in places], quantized, 0.4, xerr=errors, label="quantized")
    axes.set_yticks(list(places), [f"by {each.judged_by}" for each in found])
    axes.set_xlabel("cost of a decision")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def draw_confusion(found: Decisions) -> Any:
    """Draw by how much quantization changes the share of each pair of decision and truth.

    Args:
        found: What was counted.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    change = (found.confusion[1] - found.confusion[0]).numpy()
    most = max(abs(float(change.min())), abs(float(change.max())), 1e-12)
    picture = axes.imshow(change, cmap="coolwarm", vmin=-most, vmax=most)
    axes.set_xlabel("truth")
    axes.set_ylabel("decision")
    figure.colorbar(picture, label="share of the samples, quantized less float")
    return figure
