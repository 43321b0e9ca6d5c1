"""Checking an allocation by its true loss: the sum of single-layer losses is a prediction, not a measurement."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product

from ..quantization.spec import BitWidths
from .problem import Problem

Assignment = Mapping[str, BitWidths]

# Number of candidates that are measured in all layers at once, the most promising first.
_UNIFORM = 2

# Number of changes of one layer or group that are combined, of those that raise bits and of those that lower them.
_MOVES = 24


def improve(
    problem: Problem,
    chosen: Assignment,
    limits: Mapping[str, float],
    measure: Callable[[Assignment], float],
    checks: int,
) -> tuple[Assignment, float]:
    """Measure the choice and up to ``checks`` alternatives within the same limits; the best so far is kept.

    First come the best uniform bit-widths that fit, which no mix should lose to; then the neighbours of the best choice
    that promise most by the predicted losses: one layer (or group) raised, or one raised and another lowered. A
    neighbour that measures better becomes the new best choice.

    Args:
        problem: Allocation problem that has its losses.
        chosen: The program's choice, for all layers.
        limits: Limits of its costs by name.
        measure: Switches the model to a choice and gives its loss.
        checks: Number of alternatives to measure, at least 0.

    Returns:
        The best choice and its measured loss.

    Raises:
        ValueError: If none of the measured losses is finite.

    Example:
        See ``allocate``, which calls it with the program's choice.
    """
    best, least = dict(chosen), measure(chosen)
    tried = {_key(chosen)}
    left = checks
    uniform = [problem.uniform(candidate) for candidate in problem.candidates]
    fitting = [choice for choice in uniform if problem.fits(choice, limits) and _key(choice) not in tried]
    for choice in sorted(fitting, key=lambda choice: problem.total("loss", choice))[: min(_UNIFORM, left)]:
        left -= 1
        tried.add(_key(choice))
        if (loss := measure(choice)) < least:
            best, least = choice, loss
    found = True
    while left and found:
        found = False
        for neighbour in _neighbours(problem, best, limits):
            if _key(neighbour) in tried:
                continue
            if not left:
                break
            left -= 1
            tried.add(_key(neighbour))
            if (loss := measure(neighbour)) < least:
                best, least, found = dict(neighbour), loss, True
                break
    if least == math.inf:
        raise ValueError(
            f"The loss of the chosen model, and of {checks - left} alternatives, is not finite: look at the model's "
            "outputs, or leave the narrowest candidates out."
        )
    return best, least


def _key(bits: Assignment) -> tuple[tuple[str, tuple[int, int]], ...]:
    """What tells choices apart, and orders them."""
    return tuple(sorted((name, of_layer.sort_key) for name, of_layer in bits.items()))


def _neighbours(problem: Problem, bits: Assignment, limits: Mapping[str, float]) -> Iterator[dict[str, BitWidths]]:
    """Choices that differ in one or two slots and keep the limits, the most promising first."""
    losses = problem.losses
    moves = [
        (sum(losses[name][to] - losses[name][bits[name]] for name, to in move.items()), move)
        for move in _moves(problem, bits)
    ]
    moves.sort(key=lambda move: (move[0], _key(move[1])))
    raised = [move for move in moves if move[0] < 0][:_MOVES]
    lowered = [move for move in moves if move[0] >= 0][:_MOVES]
    changes = [*raised]
    changes += [(up + down, {**b, **a}) for (up, a), (down, b) in product(raised, lowered) if not a.keys() & b.keys()]
    changes += lowered
    for _, change in sorted(changes, key=lambda change: (change[0], _key(change[1]))):
        neighbour = {**bits, **change}
        if problem.fits(neighbour, limits):
            yield neighbour


def _moves(problem: Problem, bits: Assignment) -> Iterator[dict[str, BitWidths]]:
    """Changes of one slot to another of its candidates."""
    for slot in problem.groups:
        for candidate in problem.options[slot[0]]:
            if candidate != bits[slot[0]] and all(candidate in problem.options[name] for name in slot):
                yield dict.fromkeys(slot, candidate)
