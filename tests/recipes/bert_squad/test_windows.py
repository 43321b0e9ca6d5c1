import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    BertForQuestionAnswering,
    PreTrainedTokenizer,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

from recipes.bert_squad.data import SquadData
from recipes.bert_squad.model import predict_answers
from recipes.bert_squad.questions import Question
from recipes.bert_squad.windows import (
    WindowMaker,
    answer_span,
    check_fit,
    check_vocabulary,
    load_tokenizer,
    pad,
    takes_token_types,
)

from .material import QUESTIONS, RIVER, make_tokenizer, squad, tiny_config, write


def test_windows_cover_the_context_and_overlap(tokenizer, questions):
    maker = WindowMaker(tokenizer, max_length=30, doc_stride=8)
    windows = maker.cut(questions[:1]).windows
    assert len(windows) > 2
    covered = [
        [tuple(offset) for offset in window.offsets[window.context.start : window.context.stop]] for window in windows
    ]
    whole = tokenizer(RIVER, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert covered[0] + [offset for part in covered[1:] for offset in part[8:]] == whole
    for before, after in itertools.pairwise(covered):
        assert before[-8:] == after[:8]
    for window in windows:
        assert len(window) <= 30 and len(window.token_type_ids) == len(window)
        assert tokenizer.decode(window.input_ids).startswith("[CLS] where does the river rise? [SEP]")
        assert [tokenizer.sep_token_id] == list(window.input_ids[window.context.stop :])


def test_a_tokenizer_that_pads_on_the_left_reads_the_question_last(questions):
    left = make_tokenizer(padding_side="left")
    windows = WindowMaker(left, 30, 8).cut(questions[:1]).windows
    for window in windows:
        assert left.decode(window.input_ids).endswith("[SEP] where does the river rise? [SEP]")
        assert window.context.start == 1
    first = windows[0]
    assert RIVER[first.offsets[1][0] : first.offsets[3][1]] == "The river rises"
    batch = pad(windows[-1:], left, 40)
    assert batch["attention_mask"][0].tolist() == [0] * (40 - len(windows[-1])) + [1] * len(windows[-1])
    assert batch["input_ids"][0, -len(windows[-1]) :].tolist() == windows[-1].input_ids.tolist()


def test_batches_are_padded_to_the_length_asked_for(tokenizer, questions):
    windows = WindowMaker(tokenizer, 30, 8, token_types=False).cut(questions).windows
    batch = pad(windows, tokenizer, 30)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].sum(1).tolist() == [len(window) for window in windows]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_spans_to_train_on_are_the_answers_or_cls_where_a_window_has_not_all(tokenizer, questions):
    found = WindowMaker(tokenizer, 30, 8).cut(questions)
    right: Counter[str] = Counter()
    for window in found.windows:
        question = found.questions[window.question]
        text, start = question.answers[0]
        first, last = answer_span(window, question, tokenizer.cls_token_id)
        offsets = window.offsets[window.context.start : window.context.stop]
        if offsets[0, 0] <= start and start + len(text) <= offsets[-1, 1]:
            assert question.context[window.offsets[first, 0] : window.offsets[last, 1]] == text
            right[question.id] += 1
        else:
            assert first == last == 0
    assert right.keys() == {question.id for question in questions}
    # Also where the padding is on the left.
    data = SquadData(WindowMaker(make_tokenizer(padding_side="left"), 30, 8), fine_tuning_batch_size=4)
    data.training_questions = questions
    seen = []
    for batch in data.fine_tuning_dataloader():
        for ids, first, last in zip(batch["input_ids"], batch["start_positions"], batch["end_positions"], strict=True):
            seen.append(tokenizer.decode(ids[first : last + 1]))
    assert {"the hills near altdorf", "three", "neuhafen", "five coins", "[CLS]"} <= set(seen)


@pytest.mark.parametrize("stride", [-1, 26, 200])
def test_a_stride_without_room_for_new_context_is_refused(tokenizer, stride):
    with pytest.raises(ValueError, match=rf"doc_stride={stride} must be at least 0 .* max_length=30 .* at most 25"):
        WindowMaker(tokenizer, 30, stride)


@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_that_leave_no_room_have_no_window_and_count_as_wrong(side, questions, tmp_path, caplog):
    tokenizer = make_tokenizer(padding_side=side)
    # 3 special tokens, 8 of overlap: 18 tokens of question are the most that a window of 30 has room for.
    longest, too_long = (Question(f"of {n}", "it " * n, RIVER, (("three", 57),)) for n in (18, 19))
    found = WindowMaker(tokenizer, 30, 8).cut([too_long, *questions, longest])
    assert found.too_long == (0,) and found.windows_of.keys() == set(range(1, 7))
    entries = [("of 19", "it " * 19, RIVER, "three"), *QUESTIONS]
    path = write(tmp_path / "long.json", squad(entries))
    data = SquadData(WindowMaker(tokenizer, 30, 8), path, path, calibration_samples=5)
    data.setup()
    assert {data.training_questions[w.question].id for w in data.calibration} <= {q.id for q in questions} | {"of 19"}
    assert data.skipped["evaluation"] == {"answer_not_in_context": 0, "question_too_long": 1}
    assert "1 of 6 questions are too long to leave room for context in max_length, and get the empty" in caplog.text
    logits = {i: (np.zeros(len(w), np.float32),) * 2 for i, w in enumerate(data.evaluation.windows)}
    answers = predict_answers(data.evaluation, logits)
    assert answers["of 19"] == "" and all(answers[q.id] for q in questions)
    with pytest.raises(ValueError, match=r"calibration_samples=6, but .*long.json has 5 questions that can be"):
        SquadData(WindowMaker(tokenizer, 30, 8), path, path, calibration_samples=6).setup()


def test_a_context_without_tokens_is_named(tokenizer):
    with pytest.raises(ValueError, match="context of question nothing has no token"):
        WindowMaker(tokenizer, 30, 8).cut([Question("nothing", "Who ?", " \u200b ", ((" ", 0),))])


class SlowTokenizer(PreTrainedTokenizer):
    """One that splits at spaces, in Python."""

    def get_vocab(self):
        return {"a": 0}

    @property
    def vocab_size(self):
        return 1

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return 0


def test_unusable_tokenizers_are_refused(tokenizer, tmp_path, monkeypatch):
    tiny_config(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no tokenizer .* as --tokenizer"):
        load_tokenizer(str(tmp_path))
    for made, message in (
        (SlowTokenizer(), "SlowTokenizer of it is not a fast tokenizer: .* give --tokenizer"),
        (make_tokenizer(cls_token=None), "of it has no cls_token; question and context"),
    ):
        monkeypatch.setattr(
            "recipes.bert_squad.windows.AutoTokenizer.from_pretrained", lambda name, use_fast, made=made: made
        )
        with pytest.raises(ValueError, match=message):
            load_tokenizer("it")


def test_tokenizer_and_lengths_that_do_not_fit_the_model_are_refused(tokenizer):
    size = len(tokenizer)
    check_fit(tokenizer, BertForQuestionAnswering(tiny_config(tokenizer)), 64)
    with pytest.raises(ValueError, match=f"largest id is {size - 1}, and the model has a vocab_size of {size - 1}"):
        check_fit(tokenizer, BertForQuestionAnswering(tiny_config(tokenizer, vocab_size=size - 1)), 64)
    with pytest.raises(ValueError, match=r"padding token '\[PAD\]' is 0, and the model's pad_token_id is 1"):
        check_fit(tokenizer, BertForQuestionAnswering(tiny_config(tokenizer, pad_token_id=1)), 64)
    with pytest.raises(ValueError, match="max_length=65, but the model has positions for 64 tokens only"):
        check_fit(tokenizer, BertForQuestionAnswering(tiny_config(tokenizer)), 65)
    with pytest.raises(ValueError, match=f"it has {size} tokens, and the model a vocab_size of {2 * size}"):
        check_fit(tokenizer, BertForQuestionAnswering(tiny_config(tokenizer, vocab_size=2 * size)), 64)


def test_a_tokenizer_that_does_not_know_the_words_is_refused(tokenizer, questions):
    maker = WindowMaker(tokenizer, 40, 8)
    check_vocabulary(maker.cut(questions).windows, tokenizer)
    others = [replace(question, context="ЭТО ДРУГОЙ ЯЗЫК " * 9) for question in questions]
    with pytest.raises(ValueError, match=r"of the calibration tokens are unknown to the tokenizer \(\[UNK\]\)"):
        check_vocabulary(maker.cut(others).windows, tokenizer)


def test_of_roberta_positions_start_after_the_padding(tokenizer):
    config = tiny_config(tokenizer).to_dict()
    config.pop("model_type")
    net = RobertaForQuestionAnswering(RobertaConfig(**{**config, "type_vocab_size": 1})).eval()
    check_fit(tokenizer, net, 63)
    net(torch.ones(1, 63, dtype=torch.long))
    with pytest.raises(ValueError, match="max_length=64, but the model has positions for 63 tokens only"):
        check_fit(tokenizer, net, 64)
    with pytest.raises((IndexError, RuntimeError)):
        net(torch.ones(1, 64, dtype=torch.long))
    assert not takes_token_types(tokenizer, net)
