import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_calibtip import QuantizationModule
from recipes.causal_lm import __main__ as recipe
from recipes.causal_lm.data import TextData
from recipes.causal_lm.model import LanguageModel, load_tokenizer
from recipes.causal_lm.text import read_text
from recipes.command_line import run_recipe
from tests.recipes.bert_squad.material import BREAD, QUESTIONS, RIVER, make_tokenizer, squad, write

SHORT = {"window": 8, "calibration_samples": 4, "batch_size": 2, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A folder with a random network and its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "questions.json", squad(QUESTIONS))


def test_contexts_and_texts_are_read_once_each(file, tmp_path):
    assert read_text(file, "train") == f"{RIVER}\n\n{BREAD}"
    (tmp_path / "text.txt").write_text("\ufeffOne.\n\nTwo.\n", encoding="utf-8")
    assert read_text(str(tmp_path / "text.txt"), "train") == "One.\n\nTwo.\n"


def test_a_dataset_of_the_hub_is_named_with_its_configuration(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"text" if name == "wiki" else "words": ["a", "b", "a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text("wiki:raw-v1", "validation") == "a\n\nb\n\na"
    assert asked == [("wiki", "raw-v1", "validation")]
    with pytest.raises(ValueError, match="other has no column text, only words"):
        read_text("other", "train")


def test_what_is_no_text_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*missing\.txt; give a text file"):
        read_text(str(tmp_path / "missing.txt"), "train")
    (tmp_path / "bad.json").write_text('{"data": [{}]}')
    with pytest.raises(ValueError, match=r"bad\.json is not SQuAD v1\.1 \(KeyError: 'paragraphs'\)"):
        read_text(str(tmp_path / "bad.json"), "train")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text"):
        read_text(str(tmp_path / "empty.txt"), "train")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not a text in UTF-8"):
        read_text(str(tmp_path / "latin.txt"), "train")


def test_windows_lie_one_behind_the_other(tiny_llama, file):
    tokenizer = load_tokenizer(tiny_llama)
    ids = tokenizer(read_text(file, "train"), add_special_tokens=False).input_ids
    data = TextData(tokenizer, file, file, 2, window=8, evaluation_windows=3, batch_size=2)
    data.setup()
    assert data.calibration.flatten().tolist() == ids[:16] and data.evaluation.flatten().tolist() == ids[:24]
    (batch,) = data.train_dataloader()
    assert torch.equal(batch, data.calibration)
    apart = TextData(tokenizer, file, file, 2, window=8, split="train")
    apart.setup()
    assert apart.evaluation.flatten().tolist() == ids[16 : len(ids) // 8 * 8]
    with pytest.raises(ValueError, match=r"calibration_samples=99, but .* holds \d+ windows of 8 tokens"):
        TextData(tokenizer, file, file, 99, window=8).setup()
    with pytest.raises(ValueError, match=r"no window of 8 tokens to evaluate on in .* beyond the calibration windows"):
        TextData(tokenizer, file, file, len(ids) // 8, window=8, split="train").setup()
    for name, value, least in (("window", 1, 2), ("evaluation_windows", 0, 1), ("batch_size", 0, 1)):
        with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
            TextData(tokenizer, file, file, **{name: value})


def test_perplexity_is_that_of_transformers(tiny_llama, file, make_trainer):
    model = LanguageModel(tiny_llama)
    data = TextData(load_tokenizer(tiny_llama), file, file, 2, window=8, batch_size=3)
    data.setup()
    (found,) = make_trainer().validate(model, data.val_dataloader(), verbose=False)
    with torch.no_grad():
        losses = [model.net(window[None], labels=window[None]).loss for window in data.evaluation]
    assert found["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


def test_a_missing_gguf_file_is_said(tiny_llama):
    with pytest.raises(FileNotFoundError, match=r"There is no GGUF file x\.gguf in"):
        LanguageModel(tiny_llama, "x.gguf")


@pytest.mark.parametrize("name,pipeline", [("w8a8", "calibrate"), ("w4a16", "sequential"), ("w4a8", "sequential")])
def test_configurations_go_through_the_recipe(name, pipeline, tiny_llama, file, tmp_path, make_trainer):
    words = {"model": tiny_llama, "train": file, "validation": file, "output": tmp_path / "out", **SHORT}
    if pipeline == "sequential":
        words |= {"adaquant.iterations": 3}
    config = Path(recipe.__file__).parent / f"{name}.yaml"
    run_recipe(recipe.main, [f"--config={config}", *(f"--{key}={value}" for key, value in words.items())])
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["recipe"], record["metric"], record["calibration_samples"]) == ("causal_lm", "perplexity", 4)
    assert record["stages"][0]["name"] == "Calibration"
    inner = [layer for layer in record["layers"] if layer["name"].endswith("proj")]
    bits = {"w8a8": (8, 8), "w4a16": (4, None), "w4a8": (4, 8)}[name]
    assert len(inner) == 14 and {(layer["weight_bits"], layer["activation_bits"]) for layer in inner} == {bits}
    loaded = QuantizationModule.load_from_checkpoint(
        tmp_path / "out" / "quantized.ckpt", model=LanguageModel(tiny_llama)
    )
    # In batches as the recipe's: other ones are summed, and so rounded, in another order.
    data = TextData(load_tokenizer(tiny_llama), file, file, 4, window=8, batch_size=SHORT["batch_size"])
    data.setup()
    (metrics,) = make_trainer().validate(loaded, data.val_dataloader(), verbose=False)
    assert metrics["perplexity"] == pytest.approx(record["quantized"], rel=1e-4)
    assert len(data.evaluation) == record["evaluation_windows"]
