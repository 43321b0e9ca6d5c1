import numpy as np
import pytest

from recipes.bert_squad.answers import best_answer
from recipes.bert_squad.windows import (
    Window,
)

CONTEXT = "zero one two three four"


def window(count=5, question=2, context=CONTEXT):
    """A window of ``question`` tokens before the words of the context, and one after."""
    offsets, start = [(0, 0)] * question, 0
    for word in context.split()[:count]:
        offsets.append((start, start + len(word)))
        start += len(word) + 1
    offsets.append((0, 0))
    ids = np.zeros(len(offsets), np.int32)
    return Window(0, ids, None, np.array(offsets, np.int32), range(question, question + count))


def logits(starts, ends):
    return np.array(starts, np.float32), np.array(ends, np.float32)


@pytest.mark.parametrize(
    "starts,ends,answer",
    [
        ([0, 0, 1, 5, 2, 0, 0, 0], [0, 0, 0, 1, 2, 5, 0, 0], "one two three"),
        # 9 + 9 with the end before the start, so 9 + 3 from the late start and 9 + 4 to the early end.
        ([0, 0, 4, 0, 0, 9, 0, 0], [0, 0, 0, 9, 0, 0, 3, 0], "zero one"),
        # The best start and end are no part of the context.
        ([99, 0, 0, 3, 0, 0, 0, 0], [0, 0, 0, 0, 4, 0, 0, 99], "one two"),
        # Negative logits, one token.
        ([-9, -9, -9, -9, -9, -1, -9, -9], [-9, -9, -9, -9, -9, -2, -9, -9], "three"),
    ],
)
def test_the_best_span_in_the_context_is_the_answer(starts, ends, answer):
    assert best_answer(CONTEXT, [window()], [logits(starts, ends)]) == answer


def test_only_the_greatest_logits_of_a_window_count():
    # The best span within reach starts at the third greatest start.
    values = logits([9, 0, 8, 0, 0, 7, 0, 0], [0, 0, 0, 0, 0, 0, 6, 9])
    assert best_answer(CONTEXT, [window()], [values], n_best=3) == CONTEXT
    assert best_answer(CONTEXT, [window()], [values], n_best=2) == CONTEXT
    assert best_answer(CONTEXT, [window()], [values], n_best=1) == ""


def test_an_answer_has_at_most_so_many_tokens():
    text = " ".join(f"word{i}" for i in range(40))
    starts, ends = np.zeros((2, 43), np.float32)
    starts[2], ends[2 + 30], ends[2 + 29] = 9, 9, 5
    found = best_answer(text, [window(40, context=text)], [(starts, ends)])
    assert found == " ".join(f"word{i}" for i in range(30))
    assert best_answer(text, [window(40, context=text)], [(starts, ends)], max_tokens=31).endswith("word30")


def test_the_best_of_all_windows_is_the_answer():
    low = logits([0, 0, 3, 0, 0, 0, 0, 0], [0, 0, 3, 0, 0, 0, 0, 0])
    high = logits([0, 0, 0, 0, 0, 0, 4, 0], [0, 0, 0, 0, 0, 0, 3, 0])
    assert best_answer(CONTEXT, [window(), window()], [low, high]) == "four"
    assert best_answer(CONTEXT, [window(), window()], [high, low]) == "four"


def test_logits_that_cannot_be_right_are_refused():
    with pytest.raises(ValueError, match="hold NaN"):
        best_answer(CONTEXT, [window()], [logits([0] * 7 + [np.nan], [0] * 8)])
    with pytest.raises(ValueError, match="NaN or infinity"):
        best_answer(CONTEXT, [window()], [logits([0] * 7 + [np.inf], [0] * 8)])
    with pytest.raises(ValueError, match="A window of 8 tokens came with 7 start logits and 8 end logits"):
        best_answer(CONTEXT, [window()], [logits([0] * 7, [0] * 8)])
