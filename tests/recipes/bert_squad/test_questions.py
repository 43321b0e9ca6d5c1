import json

import datasets
import pytest

from recipes.bert_squad.questions import Question, read_questions

from .material import BREAD, QUESTIONS, RIVER, entry, squad, write


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
