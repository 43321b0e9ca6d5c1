import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertModel,
)

from lightning_calibtip import QuantizationModule, QuantizationScheme
from recipes.bert_squad import __main__ as recipe
from recipes.bert_squad import model as model_file
from recipes.bert_squad.data import SquadData
from recipes.bert_squad.model import QuestionAnswering
from recipes.bert_squad.windows import (
    WindowMaker,
    load_tokenizer,
)
from recipes.command_line import run_recipe

from .material import QUESTIONS, entry, prepared, squad, tiny_config, write

W8A8 = QuantizationScheme(8, 8)
SHORT = {"max_length": 30, "doc_stride": 8, "calibration_samples": 5, "accelerator": "cpu"}


def test_recipe_writes_record_and_checkpoint(tiny_bert, file, tmp_path, make_trainer):
    content = squad(QUESTIONS)
    entry(content, 1)["answers"][0]["answer_start"] += 1
    entry(content, 2)["question"] = "it " * 19
    validation = write(tmp_path / "validation.json", content)
    output = tmp_path / "out"
    recipe.main(tiny_bert, file, validation, pipeline="calibrate", scheme=W8A8, output=output, **SHORT)
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
            words = [f"--config={folder / name}.yaml", *(f"--{key}={value}" for key, value in options.items())]
            run_recipe(recipe.main, words)
        assert seen["pipeline"] == {"w8a8": "calibrate", "w4a8": "sequential", "mixed": "mixed"}[name]


def test_groups_of_weights_alone_go_through_the_recipe(tiny_bert, file, tmp_path):
    words = {"model": tiny_bert, "train": file, "validation": file, "output": tmp_path / "out", **SHORT}
    words |= {"weight_bits": 4, "activation_bits": "null", "edge_bits": "null", "group_size": 32, "target": "null"}
    words |= {"adaquant.iterations": 2, "bias_tuning.epochs": 1}
    run_recipe(recipe.main, [f"--{key}={value}" for key, value in words.items()])
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [stage["name"] for stage in record["stages"]][-2:] == ["AdaQuant", "BiasTuning"]
    assert {layer["activation_bits"] for layer in record["layers"]} == {None}
    assert {layer["weight_bits"] for layer in record["layers"]} == {4, None}


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
    recipe.main(str(tmp_path / "b"), file, file, pipeline="calibrate", scheme=W8A8, output=output, **options)
    assert "has no trained question answering head: it is fine-tuned on" in caplog.text
    record = json.loads((output / "result.json").read_text())
    assert record["float"] == record["exact_match"]["float"] == 1.0
    caplog.clear()
    # What was written is a model with a head.
    recipe.main(
        str(output / "fine_tuned"), file, file, pipeline="calibrate", scheme=W8A8, output=tmp_path / "2", **options
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
