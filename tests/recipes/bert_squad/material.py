"""Five questions, a tokenizer of their words, and what both are made into."""

import json
from types import SimpleNamespace

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
)

from recipes.bert_squad.data import SquadData
from recipes.bert_squad.model import QuestionAnswering
from recipes.bert_squad.windows import (
    WindowMaker,
    load_tokenizer,
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


def entry(content, index=0):
    return content["data"][0]["paragraphs"][0]["qas"][index]


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
