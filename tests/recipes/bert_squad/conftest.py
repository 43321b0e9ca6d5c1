import pytest
import torch
from transformers import (
    BertForQuestionAnswering,
)

from recipes.bert_squad.questions import read_questions

from .material import QUESTIONS, make_tokenizer, squad, tiny_config, write


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
