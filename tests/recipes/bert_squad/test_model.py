import copy

import numpy as np
import pytest
import torch
from transformers import (
    BertForQuestionAnswering,
)

from lightning_calibtip import QuantizationModule
from recipes.bert_squad.model import QuestionAnswering
from recipes.bert_squad.questions import Question

from .material import oracle, prepared, tiny_config


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
