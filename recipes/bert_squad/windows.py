"""Windows: a question with as much of its context as the network reads at once, overlapping to cover all of it."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .questions import Question, first_ids

log = logging.getLogger(__name__)

Integers = npt.NDArray[np.int32]

# Questions are tokenized so many at once: enough to be fast, without a copy of the whole file in memory.
_CHUNK = 1000

# Vocabularies are padded to a round number, but not by this much.
_LEAST_VOCABULARY = 0.9

# More unknown tokens than this share means a tokenizer of another language, or another case.
_MOST_UNKNOWN = 0.05


@dataclass(frozen=True, eq=False)
class Window:
    """What the network reads at once, without padding.

    Args:
        question: Index of the question.
        input_ids: (tokens,)
        token_type_ids: (tokens,), None for a network without.
        offsets: (tokens, 2), first character of each token in the context and the one after its last; of context tokens
            only.
        context: Where the context tokens are.
    """

    question: int
    input_ids: Integers
    token_type_ids: Integers | None
    offsets: Integers
    context: range

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class WindowSet:
    """Questions and their windows. Copies share it: it is large and never changes.

    Args:
        questions: All of them.
        windows: In the order of the questions.
        too_long: Indices of the questions that leave no room for the context, and have no window.
    """

    questions: tuple[Question, ...]
    windows: tuple[Window, ...]
    too_long: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "WindowSet":
        return self

    @property
    def windows_of(self) -> dict[int, list[int]]:
        """Indices of the windows of each question that has any."""
        found: dict[int, list[int]] = {}
        for index, window in enumerate(self.windows):
            found.setdefault(window.question, []).append(index)
        return found


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or of the hub.

    Raises:
        ValueError: If it does not give the position of tokens in the text, has no vocabulary, or lacks special tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} of {name} is not a fast tokenizer: it does not tell where a token lies in "
            "the text, so that no answer can be read off. Choose a model with a tokenizer.json, or give --tokenizer."
        )
    missing = [kind for kind in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, kind) is None]
    if missing:
        raise ValueError(
            f"{type(tokenizer).__name__} of {name} has no {', '.join(missing)}; question and context cannot be put "
            "together as a question answering model reads them. Give the tokenizer it was trained with as --tokenizer."
        )
    # transformers makes a tokenizer of nothing but special tokens where the folder has none.
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_tokens)):
        raise ValueError(
            f"{name} holds no tokenizer (no tokenizer.json and no vocabulary); give the tokenizer of the model as "
            "--tokenizer."
        )
    return tokenizer


def check_fit(tokenizer: PreTrainedTokenizerBase, net: PreTrainedModel, max_length: int) -> None:
    """Make sure that the network can read what the tokenizer makes.

    Args:
        tokenizer: Tokenizer of any kind.
        net: The network.
        max_length: Tokens of the longest window.

    Raises:
        ValueError: If a token has no embedding, the padding is another one, or there are fewer positions than
            ``max_length``.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= net.config.vocab_size:
        raise ValueError(
            f"The tokenizer does not fit the model: its largest id is {largest}, and the model has a vocab_size of "
            f"{net.config.vocab_size}. Give the tokenizer it was trained with as --tokenizer."
        )
    # Of another family's tokenizer with a smaller vocabulary, the ids would pass.
    padding = getattr(net.config, "pad_token_id", None)
    if padding is not None and padding != tokenizer.pad_token_id:
        raise ValueError(
            f"The tokenizer does not fit the model: its padding token {tokenizer.pad_token!r} is "
            f"{tokenizer.pad_token_id}, and the model's pad_token_id is {padding}. Give the tokenizer it was trained "
            "with as --tokenizer."
        )
    if largest < _LEAST_VOCABULARY * net.config.vocab_size:
        raise ValueError(
            f"The tokenizer does not fit the model: it has {largest + 1} tokens, and the model a vocab_size of "
            f"{net.config.vocab_size}. Give the tokenizer it was trained with as --tokenizer."
        )
    positions = getattr(net.config, "max_position_embeddings", None)
    # Relative positions (XLNet) have no end.
    if positions is None or positions < 0:
        return
    for name, module in net.named_modules():
        # RoBERTa and its relatives count positions from the one after the padding's.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            positions -= module.padding_idx + 1
    if max_length > positions:
        raise ValueError(f"max_length={max_length}, but the model has positions for {positions} tokens only.")


def check_vocabulary(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the tokenizer knows the words.

    Raises:
        ValueError: If more than a twentieth of the tokens is unknown.
    """
    if tokenizer.unk_token_id is None or not windows:
        return
    tokens = np.concatenate([window.input_ids for window in windows])
    unknown = float((tokens == tokenizer.unk_token_id).mean())
    if unknown > _MOST_UNKNOWN:
        raise ValueError(
            f"{unknown:.0%} of the calibration tokens are unknown to the tokenizer ({tokenizer.unk_token}): it is of "
            "another language, or of another case, than the questions. Give the one of the model as --tokenizer."
        )


def takes_token_types(tokenizer: PreTrainedTokenizerBase, net: PreTrainedModel) -> bool:
    """Whether the tokenizer gives token types and the network knows more than one."""
    return "token_type_ids" in tokenizer.model_input_names and getattr(net.config, "type_vocab_size", 2) > 1


class WindowMaker:
    """Cuts questions into windows.

    Question and context come in the order that the tokenizer's padding side says: a network that is padded on the left
    reads the question last.

    Args:
        tokenizer: A fast one.
        max_length: Most tokens of a window, special tokens included.
        doc_stride: Number of context tokens that a window shares with the next one.
        token_types: Whether windows have ``token_type_ids``.

    Raises:
        ValueError: If the lengths leave no room for new context in the next window.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 384,
        doc_stride: int = 128,
        token_types: bool = True,
    ) -> None:
        special = tokenizer.num_special_tokens_to_add(pair=True)
        if not 0 <= doc_stride < max_length - special - 1:
            raise ValueError(
                f"doc_stride={doc_stride} must be at least 0 and leave room in max_length={max_length} for the "
                f"{special} special tokens, the question, and new context: at most {max_length - special - 2}, and "
                "better half of that."
            )
        self.tokenizer, self.max_length, self.doc_stride = tokenizer, max_length, doc_stride
        self.token_types = token_types
        self.question_first = tokenizer.padding_side == "right"
        # The most tokens that a question may have.
        self.room = max_length - special - doc_stride - 1

    def cut(self, questions: Sequence[Question]) -> WindowSet:
        """Windows of all questions.

        Raises:
            ValueError: If a context holds nothing that the tokenizer keeps.
        """
        windows: list[Window] = []
        too_long: list[int] = []
        for start in range(0, len(questions), _CHUNK):
            windows.extend(self._cut_chunk(questions[start : start + _CHUNK], start, too_long))
        return WindowSet(tuple(questions), tuple(windows), tuple(too_long))

    def _cut_chunk(self, questions: Sequence[Question], start: int, too_long: list[int]) -> Iterator[Window]:
        # Some questions of SQuAD start with dozens of spaces.
        texts = [question.question.strip() for question in questions]
        lengths = [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        fitting = [index for index, length in enumerate(lengths) if length <= self.room]
        too_long.extend(start + index for index, length in enumerate(lengths) if length > self.room)
        if not fitting:
            return
        asked, contexts = [texts[index] for index in fitting], [questions[index].context for index in fitting]
        encoding = self.tokenizer(
            *((asked, contexts) if self.question_first else (contexts, asked)),
            truncation="only_second" if self.question_first else "only_first",
            max_length=self.max_length,
            stride=self.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=self.token_types,
            padding=False,
        )
        for row, sample in enumerate(encoding["overflow_to_sample_mapping"]):
            sequences = encoding.sequence_ids(row)
            context = [i for i, sequence in enumerate(sequences) if sequence == int(self.question_first)]
            if not context:
                raise ValueError(
                    f"The context of question {questions[fitting[sample]].id} has no token; it must hold text."
                )
            yield Window(
                start + fitting[sample],
                np.array(encoding["input_ids"][row], np.int32),
                np.array(encoding["token_type_ids"][row], np.int32) if self.token_types else None,
                np.array(encoding["offset_mapping"][row], np.int32),
                range(context[0], context[-1] + 1),
            )


def report_too_long(found: WindowSet, source: str, consequence: str) -> None:
    """Warn of questions that leave no room for the context."""
    if found.too_long:
        log.warning(
            "%s: %d of %d questions are too long to leave room for context in max_length, and %s: %s.",
            source,
            len(found.too_long),
            len(found.questions),
            consequence,
            first_ids([found.questions[index].id for index in found.too_long]),
        )


def pad(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Tensor]:
    """Batch of windows, padded to one length on the tokenizer's side.

    Returns:
        ``input_ids``, ``attention_mask`` and, where the windows have them, ``token_type_ids``: (windows, length).
    """
    columns = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}
    if windows[0].token_type_ids is not None:
        columns["token_type_ids"] = tokenizer.pad_token_type_id
    batch = {name: torch.full((len(windows), length), filler) for name, filler in columns.items()}
    for row, window in enumerate(windows):
        taken = slice(0, len(window)) if tokenizer.padding_side == "right" else slice(length - len(window), length)
        batch["attention_mask"][row, taken] = 1
        for name in columns.keys() - {"attention_mask"}:
            batch[name][row, taken] = torch.from_numpy(getattr(window, name)).long()
    return batch


def answer_span(window: Window, question: Question, cls_token_id: int) -> tuple[int, int]:
    """First and last token of the first reference answer, to train on; of the CLS token where the window has not all of
    the answer."""
    text, start = question.answers[0]
    stop = start + len(text)
    offsets = window.offsets[window.context.start : window.context.stop]
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
    if len(inside) == 0 or offsets[0, 0] > start or offsets[-1, 1] < stop:
        cls = int(np.flatnonzero(window.input_ids == cls_token_id)[0])
        return cls, cls
    return window.context.start + int(inside[0]), window.context.start + int(inside[-1])
