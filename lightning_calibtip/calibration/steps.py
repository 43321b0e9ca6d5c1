"""How a long piece of work tells how far it has come, to whoever shows it."""

from collections.abc import Callable

# ``steps(done, total, what)``: so many of so many steps are done, and what is being done, with its present error.
Steps = Callable[[int, int, str], None]


def untold(done: int, total: int, what: str) -> None:
    """Steps that nobody is told of."""


def part_of(steps: Steps, position: int, parts: int, prefix: str = "") -> Steps:
    """Steps of one of several equal parts of a piece of work.

    Args:
        steps: Of the whole.
        position: Of the part, from 0.
        parts: Number of parts.
        prefix: Put before what is being done.

    Example:
        >>> part_of(lambda *told: print(told), position=1, parts=3, prefix="W4A4 ")(5, 10, "conv1")
        (15, 30, 'W4A4 conv1')
    """

    def told(done: int, total: int, what: str) -> None:
        steps(position * total + done, parts * total, f"{prefix}{what}")

    return told
