"""From logits to the text of an answer, as the official evaluation of BERT on SQuAD does it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .windows import Window

Logits = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def best_answer(
    context: str, windows: Sequence[Window], logits: Sequence[Logits], n_best: int = 20, max_tokens: int = 30
) -> str:
    """Text of the span with the greatest sum of start and end logit, over all windows of a question.

    Args:
        context: Context of the question.
        windows: Windows of the question.
        logits: For each window, its start logits and its end logits, both of shape (tokens,), without padding.
        n_best: Number of greatest start logits, and of greatest end logits, that count in each window, wherever they
            are.
        max_tokens: Longer spans are not considered.

    Returns:
        A part of the context; the empty string if no span qualifies: both ends in the context, the end not before the
        start.

    Raises:
        ValueError: If the logits do not fit the windows, or are not finite.
    """
    best, answer = -np.inf, ""
    for window, (starts, ends) in zip(windows, logits, strict=True):
        if not len(starts) == len(ends) == len(window):
            raise ValueError(
                f"A window of {len(window)} tokens came with {len(starts)} start logits and {len(ends)} end logits."
            )
        if not (np.isfinite(starts).all() and np.isfinite(ends).all()):
            raise ValueError("The network's logits hold NaN or infinity; no answer can be read off.")
        first, last = (_greatest(values, n_best, window.context) for values in (starts, ends))
        lengths = last[None, :] - first[:, None] + 1
        scores = starts[first][:, None] + ends[last][None, :]
        scores = np.where((lengths >= 1) & (lengths <= max_tokens), scores, -np.inf)
        if scores.size and scores.max() > best:
            best = scores.max()
            row, column = np.unravel_index(scores.argmax(), scores.shape)
            answer = context[window.offsets[first[row], 0] : window.offsets[last[column], 1]]
    return answer


def _greatest(values: npt.NDArray[np.float32], count: int, allowed: range) -> npt.NDArray[np.intp]:
    """Positions of the greatest values, greatest first, as far as they are allowed."""
    order = np.argsort(-values, kind="stable")[:count]
    return order[(order >= allowed.start) & (order < allowed.stop)]
