"""Progress callbacks: how a long computation reports how far it has come, to whoever displays it."""

from collections.abc import Callable

# ``progress(done, total, what)``: ``done`` of ``total`` steps are finished; ``what`` names the step in work.
ProgressCallback = Callable[[int, int, str], None]


def no_progress(done: int, total: int, what: str) -> None:
    """Progress callback that ignores every report.

    Args:
        done: Number of finished steps.
        total: Number of all steps.
        what: Description of the step in work.

    Example:
        >>> no_progress(1, 2, "conv1")
    """


def part_of(progress: ProgressCallback, position: int, parts: int, prefix: str = "") -> ProgressCallback:
    """Progress callback for one of several equal parts of a computation.

    Args:
        progress: Progress callback of the whole computation.
        position: Index of the part, from 0.
        parts: Number of parts.
        prefix: Text put before each description.

    Example:
        >>> part_of(lambda *report: print(report), position=1, parts=3, prefix="W4A4 ")(5, 10, "conv1")
        (15, 30, 'W4A4 conv1')
    """

    def report(done: int, total: int, what: str) -> None:
        progress(position * total + done, parts * total, f"{prefix}{what}")

    return report
