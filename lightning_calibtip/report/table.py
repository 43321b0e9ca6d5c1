"""Text tables for people in a terminal."""

from collections.abc import Sequence

from ..network.summary import LayerSummary, float_kinds


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lines with aligned columns; numbers to the right, everything else to the left.

    Args:
        header: Names of the columns.
        rows: Cells of each line; None is shown as ``-``.

    Example:
        >>> print(text_table(["layer", "bits"], [["conv1", 8], ["fc", None]]))
        layer  bits
        -----  ----
        conv1     8
        fc        -
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    lengths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) or row[i] is None for row in rows)
        for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        aligned = [c.rjust(n) if r else c.ljust(n) for c, n, r in zip(row, lengths, right, strict=True)]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * length for length in lengths]), *map(line, cells)])


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def layer_table(lines: Sequence[LayerSummary]) -> str:
    """The layer summary as a text table: the status of each layer, and at the end a count, and a line for each kind of
    what stays float.

    Args:
        lines: Lines of the summary.

    Example:
        >>> line = LayerSummary("fc", "Linear", "quantized", 4, None, 6, "weights in groups of 32")
        >>> print(layer_table([line]))
        layer  type    is         weight bits  activation bits  weights  note
        -----  ------  ---------  -----------  ---------------  -------  -----------------------
        fc     Linear  quantized            4                -        6  weights in groups of 32
        1 quantized, 0 folded, 0 float
    """
    rows = [[s.name, s.type, s.kind, s.weight_bits, s.activation_bits, s.parameters, s.note] for s in lines]
    counts = {kind: sum(s.kind == kind for s in lines) for kind in ("quantized", "folded", "float")}
    closing = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    header = ["layer", "type", "is", "weight bits", "activation bits", "weights", "note"]
    return "\n".join([text_table(header, rows), closing, *float_kinds(lines)])
