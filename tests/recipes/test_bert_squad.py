import copy
import itertools
import json
import re
import string
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from jsonargparse import auto_cli
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    BertTokenizer,
    PreTrainedTokenizer,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

from lightning_calibtip import QuantizationModule
from recipes.bert_squad import __main__ as recipe
from recipes.bert_squad import model as model_file
from recipes.bert_squad.answers import best_answer
from recipes.bert_squad.data import SquadData
from recipes.bert_squad.model import QuestionAnswering, predict_answers
from recipes.bert_squad.questions import Question, read_questions
from recipes.bert_squad.windows import (
    Window,
    WindowMaker,
    answer_span,
    check_fit,
    load_tokenizer,
    pad,
    takes_token_types,
)

RIVER = (
    "The river rises in the hills near Altdorf . It passes three old mills and a bridge of stone . Below the bridge "
    "it turns to the west , where fishermen once lived . After ninety miles it reaches the sea at Neuhafen ."
)
# The bread's name has a combining accent and the baker's a letter outside the basic plane.
BREAD = "Crème brûlée was sold by Ωmega 𐐰lfons , but the cafe\u0301 bread cost five coins ."
QUESTIONS = [
    ("rise", "Where does the river rise ?", RIVER, "the hills near Altdorf"),
    ("mills", "How many mills does it pass ?", RIVER, "three"),
    ("sea", "Where does it reach the sea ?", RIVER, "Neuhafen"),
    ("baker", "Who sold it ?", BREAD, "Ωmega 𐐰lfons"),
    ("price", "What did the bread cost ?", BREAD, "five coins"),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def squad(entries):
    """SQuAD v1.1 of (id, question, context, answer), one paragraph a context."""
    paragraphs = {}
    for identity, question, context, answer in entries:
        answers = [{"text": answer, "answer_start": context.index(answer)}]
        paragraphs.setdefault(context, []).append({"id": identity, "question": question, "answers": answers})
    content = [{"context": context, "qas": qas} for context, qas in paragraphs.items()]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": content}]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def make_tokenizer(**options):
    text = " ".join(" ".join(entry[1:3]) for entry in QUESTIONS).lower()
    pieces = sorted({piece for word in text.split() for piece in (word, word[0], *(f"##{c}" for c in word))})
    return BertTokenizer(vocab={token: i for i, token in enumerate([*SPECIAL, *pieces])}, **options)


def tiny_config(tokenizer, **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig(**{"vocab_size": len(tokenizer), "max_position_embeddings": 64, **sizes, **options})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def tiny_bert(tokenizer, tmp_path_factory):
    """A folder with a random network and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertForQuestionAnswering(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "questions.json", squad(QUESTIONS))


@pytest.fixture
def questions(file):
    return read_questions(file, "train").questions


# Reading


def test_questions_come_with_their_context_and_answers(file):
    found = read_questions(file, "validation")
    assert [question.id for question in found.questions] == ["rise", "mills", "sea", "baker", "price"]
    assert found.questions[3] == Question("baker", "Who sold it ?", BREAD, (("Ωmega 𐐰lfons", 25),))
    assert found.misplaced == ()


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(squad(QUESTIONS)), encoding="utf-8-sig")
    assert len(read_questions(str(path), "train").questions) == 5


def test_datasets_of_the_hub_are_read_alike(monkeypatch, questions):
    asked = []

    def load(name, split):
        asked.append((name, split))
        answers = [
            {"text": [text for text, _ in q.answers], "answer_start": [start for _, start in q.answers]}
            for q in questions
        ]
        return datasets.Dataset.from_list(
            [
                {"id": q.id, "title": "t", "context": q.context, "question": q.question, "answers": a}
                for q, a in zip(questions, answers, strict=True)
            ]
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_questions("squad", "validation").questions == questions
    assert asked == [("squad", "validation")]


@pytest.mark.parametrize(
    "row,message",
    [
        ({"text": "hello"}, r"some/set \(train\): row 0 is not SQuAD v1.1, .*'answers'; the columns are text"),
        (
            {"id": "a", "question": "?", "context": "c", "answers": {"text": [], "answer_start": []}},
            r"row 0 \(id a\) has no answer. This recipe reads SQuAD v1.1",
        ),
    ],
)
def test_other_datasets_of_the_hub_are_refused(monkeypatch, row, message):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [row])
    with pytest.raises(ValueError, match=message):
        read_questions("some/set", "train")


def changed(change):
    content = squad(QUESTIONS)
    change(content)
    return content


def all_answers(content):
    paragraphs = content["data"][0]["paragraphs"]
    return [answer for paragraph in paragraphs for qa in paragraph["qas"] for answer in qa["answers"]]


def entry(content, index=0):
    return content["data"][0]["paragraphs"][0]["qas"][index]


@pytest.mark.parametrize(
    "content,message",
    [
        ("{", "is not a JSON file in UTF-8: Expecting property name"),
        ([], r"the whole must be an object with 'data', not \[\]"),
        ({"version": "1.1"}, "the whole has no 'data', only 'version'"),
        ({"data": {}}, r"data must be a list, not \{\}"),
        ({"data": ["x"]}, r"data\[0\] must be an object with 'paragraphs', not \"x\""),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\] has no 'context', only 'qas'"),
        (
            changed(lambda c: entry(c, 2).pop("id")),
            r"data\[0\].paragraphs\[0\].qas\[2\] has no 'id', only 'question', 'answers'",
        ),
        (changed(lambda c: entry(c).update(id=7)), r"qas\[0\].id must be a string, not 7"),
        (
            changed(lambda c: entry(c)["answers"][0].update(answer_start=True)),
            r"answers\[0\].answer_start must be an integer, not true",
        ),
        (
            changed(lambda c: entry(c).update(answers={"text": ["x"]})),
            r"qas\[0\].answers must be a list, not \{\"text\": \[\"x\"\]\}",
        ),
        (
            changed(lambda c: entry(c, 1).update(answers=[], is_impossible=True)),
            r"data\[0\].paragraphs\[0\].qas\[1\] \(id mills\) has no answer. .* leave out the questions with is_imposs",
        ),
        (changed(lambda c: entry(c)["answers"][0].update(text="")), r"qas\[0\] \(id rise\) has an empty answer"),
        (changed(lambda c: entry(c).update(id="sea")), "holds the id 'sea' twice"),
        ({"data": []}, "holds no question"),
        (
            changed(lambda c: [answer.update(answer_start=3) for answer in all_answers(c)]),
            "none of the 5 questions has an answer at its answer_start",
        ),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_the_place(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_questions(path, "train")
    assert path in str(caught.value)


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a JSON file in UTF-8"):
        read_questions(str(tmp_path / "bad.json"), "train")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.json"):
        read_questions(str(tmp_path / "none.json"), "train")


def test_answers_outside_the_context_are_dropped_and_their_questions_reported(tmp_path, caplog):
    content = squad(QUESTIONS)
    entry(content)["answers"].append({"text": "Altdorf", "answer_start": 0})
    entry(content, 1)["answers"][0]["answer_start"] += 1
    # Would be right if it were counted from the end.
    entry(content, 2)["answers"][0]["answer_start"] = RIVER.index("Neuhafen") - len(RIVER)
    found = read_questions(write(tmp_path / "questions.json", content), "train")
    assert [question.id for question in found.questions] == ["rise", "baker", "price"]
    assert found.questions[0].answers == (("the hills near Altdorf", RIVER.index("the hills")),)
    assert found.misplaced == ("mills", "sea")
    assert "2 of 5 questions are left out" in caplog.text and "mills, sea." in caplog.text


# Windows


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


# Answers

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
    with pytest.raises(ValueError, match="A window of 8 tokens came with 7 start logits and 8 end logits"):
        best_answer(CONTEXT, [window()], [logits([0] * 7, [0] * 8)])


# The LightningModule


def oracle(tokenizer, questions):
    """A forward that knows the answers, but of windows that have not all of one would like a wrong answer a little."""

    def forward(input_ids, attention_mask, token_type_ids=None):
        starts, ends = torch.full((2, *input_ids.shape), -5.0)
        answers = {
            tuple(tokenizer(q.question, add_special_tokens=False)["input_ids"]): tokenizer(
                q.answers[0][0], add_special_tokens=False
            )["input_ids"]
            for q in questions
        }
        for row, ids in enumerate(input_ids.tolist()):
            context = ids.index(tokenizer.sep_token_id) + 1
            target = answers[tuple(ids[1 : context - 1])]
            starts[row, context], ends[row, context] = 1.0, 1.0
            for i in range(context, len(ids)):
                if ids[i : i + len(target)] == target:
                    starts[row, i], ends[row, i + len(target) - 1] = 4.0, 4.0
        return SimpleNamespace(start_logits=starts, end_logits=ends)

    return forward


def prepared(file, tiny_bert, **options):
    tokenizer = load_tokenizer(tiny_bert)
    trained = QuestionAnswering(tiny_bert)
    data = SquadData(WindowMaker(tokenizer, 30, 8), file, file, **{"calibration_samples": 5, **options})
    data.setup()
    trained.evaluation = data.evaluation
    return trained, data


def test_answers_are_found_in_later_windows_and_scored(file, tiny_bert, questions, make_trainer):
    trained, data = prepared(file, tiny_bert, eval_batch_size=4)
    trained.forward = oracle(data.tokenizer, questions)
    (metrics,) = make_trainer().validate(trained, data.val_dataloader(), verbose=False)
    assert metrics == {"f1": 1.0, "exact_match": 1.0}
    # Of the four words of the answer "the hills near Altdorf", "the" does not count: 2 of 3 are found.
    wrong = {q.id: Question(q.id, q.question, q.context, (("hills near", 0),)) for q in questions[:1]}
    trained.forward = oracle(data.tokenizer, [wrong.get(q.id, q) for q in questions])
    (metrics,) = make_trainer().validate(trained, data.val_dataloader(), verbose=False)
    assert metrics["exact_match"] == pytest.approx(0.8)
    assert metrics["f1"] == pytest.approx((4 + 2 * 1 * (2 / 3) / (1 + 2 / 3)) / 5)


def test_padding_does_not_matter_to_the_answers(file, tiny_bert):
    trained, data = prepared(file, tiny_bert)
    found = {}
    for size in (1, 4, 16):
        data.eval_batch_size = size
        for batch in data.val_dataloader():
            assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
            with torch.no_grad():
                trained.validation_step(batch, 0)
        assert len(trained._logits) == len(data.evaluation.windows)
        for index, (starts, ends) in trained._logits.items():
            assert len(starts) == len(data.evaluation.windows[index])
            before = found.setdefault(index, (starts, ends))
            np.testing.assert_allclose(starts, before[0], atol=1e-5)
            np.testing.assert_allclose(ends, before[1], atol=1e-5)


def test_copies_share_the_questions(file, tiny_bert):
    trained, _ = prepared(file, tiny_bert)
    assert copy.deepcopy(trained).evaluation is trained.evaluation
    assert QuantizationModule(trained).model.evaluation is trained.evaluation


def test_nothing_is_scored_unless_all_windows_were_seen(file, tiny_bert, make_trainer, caplog):
    trained, data = prepared(file, tiny_bert, eval_batch_size=4)
    assert make_trainer(limit_val_batches=1).validate(trained, data.val_dataloader(), verbose=False) == [{}]
    assert f"saw 4 of {len(data.evaluation.windows)} windows" in caplog.text
    assert set(make_trainer().validate(trained, data.val_dataloader(), verbose=False)[0]) == {"f1", "exact_match"}
    trained.evaluation = None
    with pytest.raises(RuntimeError, match="no questions to score: set evaluation="):
        make_trainer().validate(trained, data.val_dataloader(), verbose=False)


def test_a_checkpoint_in_half_precision_is_computed_in_single(tiny_bert, tmp_path):
    BertForQuestionAnswering.from_pretrained(tiny_bert).half().save_pretrained(tmp_path)
    trained = QuestionAnswering(str(tmp_path))
    assert trained.has_trained_head and {p.dtype for p in trained.parameters()} == {torch.float32}


def test_a_checkpoint_of_another_network_is_refused(tokenizer, tmp_path):
    net = BertForQuestionAnswering(tiny_config(tokenizer, num_hidden_layers=1))
    net.config.num_hidden_layers = 2
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no bert.encoder.layer.1.*, \.\.\. \(16 weights are missing\)"):
        QuestionAnswering(str(tmp_path))


# The data


def test_calibration_samples_are_one_window_of_so_many_questions(file, tiny_bert):
    _, data = prepared(file, tiny_bert, calibration_samples=3, split="train", batch_size=2)
    batches = list(data.train_dataloader())
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 30), (1, 30)]
    assert batches[0].keys() == {"input_ids", "attention_mask", "token_type_ids"}
    asked = [data.tokenizer.decode(row).split(" [SEP]")[0] for batch in batches for row in batch["input_ids"]]
    evaluated = [data.tokenizer.decode(w.input_ids).split(" [SEP]")[0] for w in data.evaluation.windows]
    assert len(set(asked)) == 3 and len(set(evaluated)) == 2 and not set(asked) & set(evaluated)
    _, again = prepared(file, tiny_bert, calibration_samples=3, split="train", batch_size=2)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again.train_dataloader(), strict=True)
    )
    orders = set()
    for seed in range(5):
        _, other = prepared(file, tiny_bert, calibration_samples=3, split="train", seed=seed)
        orders.add(tuple(question.id for question in other.evaluation.questions))
    assert len(orders) > 1


def test_impossible_numbers_of_samples_are_refused(file, tiny_bert):
    with pytest.raises(ValueError, match=r"calibration_samples=6, but .* has 5 questions that can be calibrated on"):
        prepared(file, tiny_bert, calibration_samples=6)
    with pytest.raises(ValueError, match=r"calibration_samples=5 leaves no question .* to evaluate on"):
        prepared(file, tiny_bert, calibration_samples=5, split="train")
    with pytest.raises(ValueError, match="calibration_samples must be at least 1, got 0"):
        prepared(file, tiny_bert, calibration_samples=0)


# The recipe

SHORT = {"max_length": 30, "doc_stride": 8, "calibration_samples": 5, "accelerator": "cpu"}


def test_recipe_writes_record_and_checkpoint(tiny_bert, file, tmp_path, make_trainer):
    content = squad(QUESTIONS)
    entry(content, 1)["answers"][0]["answer_start"] += 1
    entry(content, 2)["question"] = "it " * 19
    validation = write(tmp_path / "validation.json", content)
    output = tmp_path / "out"
    recipe.main(
        tiny_bert, file, validation, pipeline="calibrate", weight_bits=8, activation_bits=8, output=output, **SHORT
    )
    record = json.loads((output / "result.json").read_text())
    assert (record["recipe"], record["model"], record["metric"]) == ("bert_squad", tiny_bert, "f1")
    assert record["calibration_samples"] == 5 and record["questions"] == 4
    assert record["skipped"] == {
        "calibration": {"answer_not_in_context": 0, "question_too_long": 0},
        "evaluation": {"answer_not_in_context": 1, "question_too_long": 1},
    }
    assert record["exact_match"].keys() == {"float", "calibrated", "quantized"}
    assert record["exact_match"]["quantized"] == record["exact_match"]["calibrated"]
    assert {layer["name"] for layer in record["layers"]} >= {
        "net.qa_outputs",
        "net.bert.encoder.layer.1.output.dense",
    }
    loaded = QuantizationModule.load_from_checkpoint(output / "quantized.ckpt", model=QuestionAnswering(tiny_bert))
    data = SquadData(WindowMaker(load_tokenizer(tiny_bert), 30, 8), file, validation, 5)
    data.setup()
    loaded.model.evaluation = data.evaluation
    (metrics,) = make_trainer().validate(loaded, data.val_dataloader(), verbose=False)
    assert metrics == pytest.approx({"f1": record["quantized"], "exact_match": record["exact_match"]["quantized"]})


def test_settings_files_are_read(tiny_bert, file, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(recipe, "quantize", lambda *args, **options: seen.update(options, pipeline=args[3]) or 1 / 0)
    folder = Path(recipe.__file__).parent
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    assert names == ["mixed", "w4a8", "w8a8"]
    for name in names:
        options = {"model": tiny_bert, "train": file, "validation": file, "output": tmp_path, **SHORT}
        with pytest.raises(ZeroDivisionError):
            auto_cli(
                recipe.main,
                args=[f"--config={folder / name}.yaml", *(f"--{key}={value}" for key, value in options.items())],
                as_positional=False,
            )
        assert seen["pipeline"] == {"w8a8": "calibrate", "w4a8": "sequential", "mixed": "mixed"}[name]


def test_a_checkpoint_without_head_is_fine_tuned_first(tokenizer, file, tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    config = tiny_config(tokenizer, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    # A random network learns five questions by heart, if more forcefully than a pretrained one should be taught.
    monkeypatch.setattr(model_file, "LEARNING_RATE", 1e-3)
    monkeypatch.setattr(recipe, "FINE_TUNING_EPOCHS", 100)
    options = {**SHORT, "max_length": 60}
    output = tmp_path / "out"
    recipe.main(str(tmp_path / "b"), file, file, pipeline="calibrate", weight_bits=8, output=output, **options)
    assert "has no trained question answering head: it is fine-tuned on" in caplog.text
    record = json.loads((output / "result.json").read_text())
    assert record["float"] == record["exact_match"]["float"] == 1.0
    caplog.clear()
    # What was written is a model with a head.
    recipe.main(
        str(output / "fine_tuned"), file, file, pipeline="calibrate", weight_bits=8, output=tmp_path / "2", **options
    )
    assert "fine-tuned" not in caplog.text
    assert json.loads((tmp_path / "2" / "result.json").read_text())["float"] == 1.0


def test_fine_tuning_has_dropout_and_a_learning_rate_that_rises_and_falls(file, tiny_bert, tmp_path, monkeypatch):
    trained, data = prepared(file, tiny_bert)
    seen, step = [], QuestionAnswering.training_step

    def watching(self, batch, batch_idx):
        seen.append((self.net.training, self.optimizers().param_groups[0]["lr"]))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(QuestionAnswering, "training_step", watching)
    monkeypatch.setattr(recipe, "FINE_TUNING_EPOCHS", 10)
    recipe.fine_tune(trained, data, "cpu", tmp_path / "tuned")
    training, rates = zip(*seen, strict=True)
    assert all(training) and not trained.training
    # 20 steps, the first tenth of them to warm up.
    assert rates == pytest.approx([0, 1.5e-5, *(3e-5 * (20 - i) / 18 for i in range(2, 20))])


# The real network


def normalized(text):
    text = "".join(" " if c in string.whitespace else c for c in text.lower() if c not in string.punctuation)
    return [word for word in re.sub(r"\b(a|an|the)\b", " ", text).split() if word]


def official_scores(prediction, answers):
    """F1 and exact match of one question, as the evaluation script of SQuAD v1.1 defines them."""
    found, best = normalized(prediction), 0.0
    for answer in answers:
        wanted = normalized(answer)
        shared = sum((Counter(found) & Counter(wanted)).values())
        if shared:
            precision, recall = shared / len(found), shared / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best, float(any(found == normalized(answer) for answer in answers))


def test_float_scores_of_the_real_network_are_the_official_ones(data_folder, tmp_path, make_trainer):
    folder = data_folder / "squad"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set CALIBTIP_TEST_DATA to the folder with squad/")
    content = json.loads((folder / "xquad-a.json").read_text())
    paragraphs, count = [], 0
    for paragraph in (paragraph for article in content["data"] for paragraph in article["paragraphs"]):
        if count < 40:
            paragraphs.append(paragraph)
            count += len(paragraph["qas"])
    path = write(tmp_path / "first.json", {"data": [{"paragraphs": paragraphs}]})
    trained, tokenizer = QuestionAnswering(str(folder / "model")), load_tokenizer(str(folder / "model"))
    assert trained.has_trained_head
    check_fit(tokenizer, trained.net, 256)
    data = SquadData(WindowMaker(tokenizer, 256, 96), str(folder / "train-sample.json"), path, 16)
    data.setup()
    trained.evaluation = data.evaluation
    (metrics,) = make_trainer().validate(trained, data.val_dataloader(), verbose=False)
    scores = []
    for paragraph in paragraphs:
        for qa in paragraph["qas"]:
            inputs = tokenizer(
                qa["question"],
                paragraph["context"],
                truncation="only_second",
                max_length=256,
                stride=96,
                padding="max_length",
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_tensors="pt",
            )
            kept = ("input_ids", "attention_mask", "token_type_ids")
            with torch.no_grad():
                output = trained.net.eval()(**{name: inputs[name] for name in kept})
            spans = []
            for row in range(len(inputs["input_ids"])):
                starts, ends = output.start_logits[row], output.end_logits[row]
                offsets = inputs["offset_mapping"][row].tolist()
                inside = [i for i, sequence in enumerate(inputs.sequence_ids(row)) if sequence == 1]
                for i in starts.topk(20).indices.tolist():
                    for j in ends.topk(20).indices.tolist():
                        if i in inside and j in inside and i <= j < i + 30:
                            spans.append((float(starts[i] + ends[j]), offsets[i][0], offsets[j][1]))
            _, start, stop = max(spans)
            scores.append(official_scores(paragraph["context"][start:stop], [a["text"] for a in qa["answers"]]))
    f1, exact = np.mean(scores, 0)
    assert len(scores) == count >= 40 and 0.3 < exact < f1 < 1
    assert metrics == pytest.approx({"f1": f1, "exact_match": exact})
