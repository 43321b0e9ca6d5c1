"""A diagnosis: what the layers cost, why, and what to do; and what remedies have done."""

from functools import partial
from typing import Any

from ..diagnosis.diagnose import AppliedRemedy, DiagnosisResult
from .chart import Chart, Series, over_layers
from .drawing import figure_over_layers
from .item import ReportItem

COLUMNS = (
    "layer",
    "type",
    "bits",
    "share of the loss",
    "cause",
    "remedies",
    "weight alone",
    "inputs alone",
    "gain of float weight",
    "gain of float inputs",
    "output error",
)


_PAGE = "diagnosis"

WHAT_COSTS_ARE = (
    "The loss is {float_loss:.4g} of the float model and {quantized_loss:.4g} of the quantized one, on {samples} "
    "calibration samples. Alone: its rise over the float model's where only this weight, or only the inputs of this "
    "layer, are quantized. Gain: its fall from the quantized model's where only they are left in float. The share of "
    "the loss is the mean of both, weight and inputs together; layers interact, so that gains of single layers are "
    "noisy and some negative. The output error is that of the layer alone quantized, relative to the mean square of "
    "its float output. Remedies are written as they are given to this package."
)


def diagnosis_items(result: DiagnosisResult) -> list[ReportItem]:
    """What each layer costs, the worst first; and, where remedies were to be applied, what they did.

    Args:
        result: The diagnosis.

    Example:
        >>> [item.title for item in diagnosis_items(DiagnosisResult("kl", 32, 0.0, 0.5, ()))]
        ['Diagnosis: what each layer costs of the loss (kl), and why']
    """
    rows = [
        [
            layer.name,
            layer.type,
            layer.bits.label,
            layer.cost.share,
            str(layer.cause),
            " or ".join(remedy.code for remedy in layer.remedies),
            layer.cost.weight_alone,
            layer.cost.inputs_alone,
            layer.cost.weight_left_float,
            layer.cost.inputs_left_float,
            layer.statistics.output_error,
        ]
        for layer in result.worst()
    ]
    title = f"Diagnosis: what each layer costs of the loss ({result.loss}), and why"
    note = WHAT_COSTS_ARE.format(
        float_loss=result.float_loss, quantized_loss=result.quantized_loss, samples=result.samples
    )
    charts = partial(cost_charts, result)
    item = ReportItem("diagnosis", title, COLUMNS, rows, partial(draw_costs, result), None, charts, note, _PAGE)
    items = [item]
    if result.outcome:
        applied = [[one.code, one.loss, one.metric, one.bytes] for one in result.applied]
        columns = ("remedy", "loss", "metric", "bytes of weights")
        draw, charts = partial(draw_remedies, result), partial(remedy_charts, result)
        items.append(ReportItem("remedies", "Remedies", columns, applied, draw, None, charts, result.outcome, _PAGE))
    return items


def cost_charts(result: DiagnosisResult) -> list[Chart]:
    """What the weight and the inputs of each layer cost, for the page; see ``draw_costs``.

    Args:
        result: The diagnosis.

    Example:
        >>> [chart.title for chart in cost_charts(DiagnosisResult("kl", 32, 0.0, 0.5, ()))]
        ['Rise of the loss if quantized alone', 'Fall of the loss if left in float']
    """
    names, costs = [layer.name for layer in result.layers], [layer.cost for layer in result.layers]
    alone = [
        Series("weight", over_layers([cost.weight_alone for cost in costs]), "line"),
        Series("inputs", over_layers([cost.inputs_alone for cost in costs]), "line"),
    ]
    left = [
        Series("weight", over_layers([cost.weight_left_float for cost in costs]), "line"),
        Series("inputs", over_layers([cost.inputs_left_float for cost in costs]), "line"),
    ]
    return [
        Chart("Rise of the loss if quantized alone", alone, names),
        Chart("Fall of the loss if left in float", left, names),
    ]


def remedy_charts(result: DiagnosisResult) -> list[Chart]:
    """The loss after each remedy that was applied, for the page; see ``draw_remedies``.

    Args:
        result: The diagnosis.

    Example:
        >>> remedy_charts(DiagnosisResult("kl", 32, 0.0, 0.5, ()))[0].layers
        ['(before)']
    """
    names = ["(before)", *map(_short, result.applied)]
    losses = [result.quantized_loss, *(one.loss for one in result.applied)]
    return [Chart("Loss after each remedy", [Series("loss", over_layers(losses), "line")], names)]


def draw_costs(result: DiagnosisResult) -> Any:
    """Draw what the weight and the inputs of each layer cost: alone quantized, and as part of the quantized model.

    Args:
        result: The diagnosis.

    Returns:
        A matplotlib figure.

    Example:
        >>> len(draw_costs(DiagnosisResult("kl", 32, 0.0, 0.5, ())).axes)
        1
    """
    names = [layer.name for layer in result.layers]
    figure, axes = figure_over_layers(names, 3.5)
    places = range(len(names))
    costs = [layer.cost for layer in result.layers]
    axes.bar([place - 0.2 for place in places], [cost.weight_left_float or 0 for cost in costs], 0.4, label="weight")
    axes.bar([place + 0.2 for place in places], [cost.inputs_left_float or 0 for cost in costs], 0.4, label="inputs")
    alone = (("C0", [cost.weight_alone for cost in costs], -0.2), ("C1", [cost.inputs_alone for cost in costs], 0.2))
    for color, values, shift in alone:
        known = [(place + shift, value) for place, value in zip(places, values, strict=True) if value is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], "_", color=color, markeredgewidth=2)
    axes.set_ylabel("loss: fall if left in float (bars),\nrise if alone quantized (lines)")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def draw_remedies(result: DiagnosisResult) -> Any:
    """Draw the loss after each remedy that was applied.

    Args:
        result: The diagnosis.

    Returns:
        A matplotlib figure.

    Example:
        >>> len(draw_remedies(DiagnosisResult("kl", 32, 0.0, 0.5, ())).axes[0].lines)
        1
    """
    names = ["(before)", *map(_short, result.applied)]
    figure, axes = figure_over_layers(names, 3.0, "remedy")
    axes.set_xlabel("remedy, in the order of application")
    axes.plot(range(len(names)), [result.quantized_loss, *(one.loss for one in result.applied)], "o-")
    axes.set_ylabel(f"loss ({result.loss})")
    return figure


def _short(remedy: AppliedRemedy) -> str:
    """How it is written, without what all overrides have in common."""
    return remedy.code.removeprefix("overrides={").removesuffix("}")
