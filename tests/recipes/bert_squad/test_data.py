import pytest
import torch

from .material import prepared


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


def test_a_file_that_is_calibrated_and_evaluated_on_is_pointed_out(file, tiny_bert, caplog):
    prepared(file, tiny_bert)
    assert "is both calibrated and evaluated on" in caplog.text
