"""Questions of SQuAD v1.1: from the hub, or from a JSON file in the format of the official distribution."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Args:
        id: Unique in its file.
        question: As asked.
        context: The paragraph that holds the answer.
        answers: Reference answers as (text, position of its first character in the context).
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class QuestionList:
    """What a file holds.

    Args:
        questions: Those with at least one answer that lies in its context, with these answers only.
        misplaced: Ids of the questions that were left out, since none of their answers is where the file says.
    """

    questions: tuple[Question, ...]
    misplaced: tuple[str, ...]


def read_questions(source: str, split: str) -> QuestionList:
    """Read all questions of a JSON file, or of a split of a dataset on the hub.

    Args:
        source: Path of a SQuAD v1.1 JSON file, or a name that ``datasets.load_dataset`` knows, such as ``squad``.
        split: ``"train"`` or ``"validation"``; of the hub's dataset only, since a file is one split.

    Raises:
        FileNotFoundError: If ``source`` is named like a JSON file and is none.
        ValueError: If it is not SQuAD v1.1 (the message says where and what was expected), holds an id twice, or no
            usable question.
    """
    path = Path(source)
    if path.is_file():
        questions = list(_from_json(path))
    elif path.suffix == ".json":
        raise FileNotFoundError(f"There is no file {source}; give a SQuAD v1.1 JSON file, or a dataset of the hub.")
    else:
        from datasets import load_dataset

        questions = list(_from_rows(load_dataset(source, split=split), f"{source} ({split})"))
    return _checked(questions, source)


def _from_json(path: Path) -> Iterator[Question]:
    try:
        # Files written on Windows may start with a byte order mark.
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file in UTF-8: {error}. SQuAD v1.1 was expected.") from error
    name = str(path)
    for i, article in enumerate(_member(content, "data", list, "", name)):
        place = f"data[{i}]"
        for j, paragraph in enumerate(_member(article, "paragraphs", list, place, name)):
            place = f"data[{i}].paragraphs[{j}]"
            context = _member(paragraph, "context", str, place, name)
            for k, entry in enumerate(_member(paragraph, "qas", list, place, name)):
                yield _question(entry, context, f"{place}.qas[{k}]", name)


def _question(entry: Any, context: str, place: str, file: str) -> Question:
    """One element of ``qas``."""
    identity, question = _member(entry, "id", str, place, file), _member(entry, "question", str, place, file)
    answers = []
    for i, answer in enumerate(_member(entry, "answers", list, place, file)):
        where = f"{place}.answers[{i}]"
        answers.append((_member(answer, "text", str, where, file), _member(answer, "answer_start", int, where, file)))
    _require_answers(answers, f"{file}: {place}", identity)
    return Question(identity, question, context, tuple(answers))


def _member(container: Any, key: str, kind: type[T], place: str, file: str) -> T:
    """``container[key]``, which must be there and of the given kind."""
    what = place or "the whole"
    if not isinstance(container, dict):
        raise ValueError(
            f"{file} is not SQuAD v1.1: {what} must be an object with {key!r}, not {_described(container)}."
        )
    if key not in container:
        raise ValueError(
            f"{file} is not SQuAD v1.1: {what} has no {key!r}, only {', '.join(map(repr, container)) or 'nothing'}."
        )
    value = container[key]
    # For Python, true and false are integers.
    if not isinstance(value, kind) or isinstance(value, bool):
        where = f"{place}.{key}" if place else key
        expected = {list: "a list", str: "a string", int: "an integer"}[kind]
        raise ValueError(f"{file} is not SQuAD v1.1: {where} must be {expected}, not {_described(value)}.")
    return value


def _described(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _require_answers(answers: Sequence[tuple[str, int]], place: str, identity: str) -> None:
    if not answers or not all(text for text, _ in answers):
        found = "an empty answer" if answers else "no answer"
        raise ValueError(
            f"{place} (id {identity}) has {found}. This recipe reads SQuAD v1.1, where each question can be answered; "
            "of SQuAD v2.0, leave out the questions with is_impossible."
        )


def _from_rows(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Question]:
    for index, row in enumerate(rows):
        try:
            answers = tuple(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
            question = Question(row["id"], row["question"], row["context"], answers)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: row {index} is not SQuAD v1.1, with the columns id, question, context and answers "
                f"(text, answer_start): {type(error).__name__} {error}; the columns are {', '.join(row)}."
            ) from error
        _require_answers(answers, f"{name}: row {index}", question.id)
        yield question


def _checked(questions: Sequence[Question], source: str) -> QuestionList:
    """Drop answers outside their context, and questions without another one."""
    if not questions:
        raise ValueError(f"{source} holds no question.")
    kept: list[Question] = []
    misplaced: list[str] = []
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"{source} holds the id {question.id!r} twice; the ids of questions must be unique.")
        seen.add(question.id)
        answers = tuple((text, start) for text, start in question.answers if _lies_in(question.context, text, start))
        if answers:
            kept.append(Question(question.id, question.question, question.context, answers))
        else:
            misplaced.append(question.id)
    if misplaced:
        log.warning(
            "%s: %d of %d questions are left out, since none of their answers is at its answer_start in the context: "
            "%s.",
            source,
            len(misplaced),
            len(questions),
            first_ids(misplaced),
        )
    if not kept:
        raise ValueError(
            f"{source}: none of the {len(questions)} questions has an answer at its answer_start in the context; "
            "answer_start counts characters from 0."
        )
    return QuestionList(tuple(kept), tuple(misplaced))


def _lies_in(context: str, text: str, start: int) -> bool:
    # A negative start would count from the end.
    return start >= 0 and context[start : start + len(text)] == text


def first_ids(ids: Sequence[str], count: int = 5) -> str:
    """The first ids of many, for a message.

    Example:
        >>> first_ids(["a", "b", "c"], 2)
        'a, b, ...'
    """
    return ", ".join(ids[:count]) + (", ..." if len(ids) > count else "")
