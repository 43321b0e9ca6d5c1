"""The benchmark as one figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def benchmark_figure(results: dict[str, Any]) -> Figure:
    """A panel for each part that was measured."""
    panels = {"growth": _growth, "step": _step, "stages": _stages, "memory": _memory, "samples": _samples}
    drawn = [name for name in panels if results.get(name)]
    figure = Figure(figsize=(7, 4 * len(drawn)), layout="constrained")
    for name, axes in zip(drawn, figure.subplots(len(drawn), 1, squeeze=False)[:, 0], strict=True):
        panels[name](axes, results[name])
    return figure


def _growth(axes: Axes, rows: list[dict[str, Any]]) -> None:
    units = [row["units"] for row in rows]
    for mode, marker in (("parallel", "o-"), ("sequential", "s-")):
        axes.plot(units, [row[f"{mode}_seconds"] for row in rows], marker, label=mode)
    axes.set(title="Time against depth", xlabel="layers", ylabel="seconds", ylim=(0, None))
    axes.legend()


def _step(axes: Axes, rows: list[dict[str, Any]]) -> None:
    bars = axes.barh([row["shape"] for row in rows], [row["ratio"] for row in rows])
    axes.bar_label(bars, fmt="%.2f")
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set(title="AdaQuant step over float forward and backward pass", xlabel="ratio", xlim=(0, None))
    axes.tick_params(axis="y", labelsize=7)


def _memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    samples = [row["samples"] for row in rows]
    for field, label in (
        ("captured_bytes", "captured"),
        ("peak_bytes", "peak of the process"),
        ("budget_bytes", "budget"),
    ):
        axes.plot(samples, [row[field] / 1e6 for row in rows], "o-", label=label)
    axes.set(title="Memory under a budget", xlabel="calibration images", ylabel="MB", ylim=(0, None))
    axes.legend()


def accuracy_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """The metric against the bit-widths, a panel for each network and a line for each kind of reconstruction, with
    standard errors."""
    networks = list(dict.fromkeys(line["network"] for line in lines))
    figure = Figure(figsize=(8, 4 * len(networks)), layout="constrained")
    for network, axes in zip(networks, figure.subplots(len(networks), 1, squeeze=False)[:, 0], strict=True):
        of_network = [line for line in lines if line["network"] == network]
        bits = list(dict.fromkeys(line["bits"] for line in of_network))
        for kind in dict.fromkeys(line["kind"] for line in of_network):
            chosen = [line for line in of_network if line["kind"] == kind]
            places = [bits.index(line["bits"]) for line in chosen]
            values = [100 * line["metric"] for line in chosen]
            errors = [100 * (line["metric_error"] or 0) for line in chosen]
            style = "o--" if "ranges" in kind else "o-"
            axes.errorbar(places, values, errors, fmt=style, capsize=3, label=kind)
        axes.set_xticks(range(len(bits)), bits)
        axes.set(title=network, ylabel="metric in %")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _stages(axes: Axes, rows: list[dict[str, Any]]) -> None:
    names = [row["stage"] for row in rows]
    bars = axes.barh(names, [row["over_adaquant"] for row in rows])
    axes.bar_label(bars, fmt="%.2f")
    axes.invert_yaxis()
    axes.set(title="Seconds of a stage over those of AdaQuant, MobileNet-v2", xlabel="ratio", xlim=(0, None))


def _samples(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for method, marker in (("AdaQuant", "o-"), ("fine-tuning", "s--")):
        chosen = [row for row in rows if row["method"] == method]
        axes.plot([r["samples"] for r in chosen], [100 * r["top1"] for r in chosen], marker, label=method)
    axes.set_xscale("log", base=2)
    axes.set(title="W4A4 against the number of calibration images", xlabel="images", ylabel="top-1 in %")
    axes.legend()


def inference_figure(rows: list[dict[str, Any]]) -> Figure:
    """Speed over float ONNX Runtime of every contender, a panel for each network."""
    figure = Figure(figsize=(7, 2.6 * len(rows)), layout="constrained")
    for row, axes in zip(rows, figure.subplots(len(rows), 1, squeeze=False)[:, 0], strict=True):
        names = [name for name in next(iter(row["ratio"].values())) if name != "float"]
        height = 0.8 / len(row["ratio"])
        for place, (size, ratios) in enumerate(row["ratio"].items()):
            places = [position + place * height for position in range(len(names))]
            axes.barh(places, [ratios[name] for name in names], height, label=f"batch {size}")
        axes.set_yticks([position + 0.4 - height / 2 for position in range(len(names))], names)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("times as fast as float ONNX Runtime, one thread")
        axes.set_title(f"{row['network']}, {row['bits']}")
        axes.legend(fontsize="small")
    return figure
