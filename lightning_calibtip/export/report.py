"""What an export is told by: size, operators by layer, differences, agreement, latency."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..report.chart import Chart, Series, over_layers
from ..report.item import ReportItem
from ..report.numbers import number, percent, short


@dataclass(frozen=True)
class LayerOperator:
    """What an engine computes a layer by.

    Args:
        layer: Full name of the layer in the model.
        operator: Operator in the engine's optimized graph; None if there is none with the layer's name, since the
            engine has merged it into another one.
        integer: Whether it takes integers.

    Example:
        >>> LayerOperator("conv1", "QLinearConv", True).integer
        True
    """

    layer: str
    operator: str | None
    integer: bool


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and what the engine makes of it.

    Args:
        path: The file.
        target: Name of the target; None for no engine in particular.
        file_bytes: Size of the file.
        float_bytes: Size of the float model's parameters and buffers.
        operators: What ONNX Runtime computes each quantized layer by; empty without a check.
        difference: Greatest difference of an output from the torch model on the batch, over the greatest absolute value
            of that output; None without a check.
        agreement: Share of decisions (greatest element along the last dimension of an output, along the second one of
            images) that are those of the torch model on the batch; None without a check, or where nothing is decided.
        latency: Median seconds of ONNX Runtime for the batch, with as many threads as torch has; None without a check.
        threads: That number of threads.

    Example:
        See ``export_onnx``.
    """

    path: Path
    target: str | None
    file_bytes: int
    float_bytes: int
    operators: tuple[LayerOperator, ...] = ()
    difference: float | None = None
    agreement: float | None = None
    latency: float | None = None
    threads: int | None = None

    @property
    def size_ratio(self) -> float:
        """Size of the file over that of the float model."""
        return self.file_bytes / self.float_bytes if self.float_bytes else 1.0

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers by the operator that computes them."""
        return dict(Counter(line.operator or "merged" for line in self.operators))

    @property
    def float_layers(self) -> list[str]:
        """Quantized layers that the engine computes in float nevertheless."""
        return [line.layer for line in self.operators if line.operator is not None and not line.integer]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``result.json``."""
        return {**asdict(self), "path": self.path.name, "size_ratio": self.size_ratio, "counts": self.counts}

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.file_bytes:,} bytes, {self.size_ratio:.3f} of the float model"]
        if self.operators:
            counts = ", ".join(f"{count} {operator}" for operator, count in sorted(self.counts.items()))
            lines.append(f"ONNX Runtime computes the quantized layers by {counts}")
        if self.float_layers:
            lines.append(f"in float, nevertheless: {', '.join(self.float_layers)}")
        if self.difference is not None:
            agreed = "" if self.agreement is None else f", {self.agreement:.2%} of decisions agree"
            lines.append(f"greatest difference from torch {self.difference:.2g} of the range{agreed}")
        if self.latency is not None:
            lines.append(f"median latency {1000 * self.latency:.3g} ms a batch on {self.threads} threads")
        return "\n".join(lines)


def export_item(reports: Sequence[ExportReport]) -> ReportItem:
    """Operators of the engine by layer, as a report item; figures of the file are in its note.

    Args:
        reports: Reports of the exports of one run, at least one.

    Example:
        >>> report = ExportReport(Path("model.onnx"), "onnxruntime", 50, 200, (LayerOperator("fc", "QGemm", True),))
        >>> export_item([report]).note, export_item([report]).rows
        ('50 B, 25.0% of the float model.', [['fc', 'QGemm', 'yes']])
    """
    report = reports[-1]
    rows = [[line.layer, line.operator, "yes" if line.integer else "no"] for line in report.operators]

    def draw() -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 2.8), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(list(report.counts), list(report.counts.values()))
        axes.set_xlabel("layers")
        return figure

    def charts() -> list[Chart]:
        counts = report.counts
        series = Series("", over_layers(list(counts.values())), "bars")
        return [Chart("Quantized layers by the operator that computes them", [series], list(counts), from_zero=True)]

    sentences = [f"{short(report.file_bytes, 'B')}, {percent(report.size_ratio)} of the float model."]
    if report.agreement is not None:
        sentences.append(f"{percent(report.agreement)} of decisions agree with torch on a calibration batch.")
    if report.latency is not None:
        threads = f"{report.threads} thread{'s' if report.threads != 1 else ''}"
        sentences.append(f"ONNX Runtime takes {number(1000 * report.latency)} ms for it on {threads}.")
    columns, title = ["layer", "operator", "integers"], f"Exported: {report.path.name}"
    return ReportItem("export", title, columns, rows, draw, charts=charts, note=" ".join(sentences))
