import json
import re
import string
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_calibtip import Calibration, QuantizationModule, QuantizationScheme
from recipes.bert_squad import __main__ as recipe
from recipes.bert_squad.answers import best_answer
from recipes.bert_squad.data import SquadData
from recipes.bert_squad.model import QuestionAnswering
from recipes.bert_squad.windows import (
    WindowMaker,
    check_fit,
    load_tokenizer,
    pad,
)

from .material import write


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


def first_questions(folder, tmp_path, wanted):
    """A file with the paragraphs of the first questions to report on, so many or a few more; and the paragraphs."""
    content = json.loads((folder / "xquad-a.json").read_text())
    paragraphs, count = [], 0
    for paragraph in (paragraph for article in content["data"] for paragraph in article["paragraphs"]):
        if count < wanted:
            paragraphs.append(paragraph)
            count += len(paragraph["qas"])
    return write(tmp_path / "first.json", {"data": [{"paragraphs": paragraphs}]}), paragraphs


def test_float_scores_of_the_real_network_are_the_official_ones(data_folder, tmp_path, make_trainer):
    folder = data_folder / "squad"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set CALIBTIP_TEST_DATA to the folder with squad/")
    path, paragraphs = first_questions(folder, tmp_path, 40)
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
    assert len(scores) >= 40 and 0.3 < exact < f1 < 1
    assert metrics == pytest.approx({"f1": f1, "exact_match": exact})


def real_data(data_folder, samples):
    folder = data_folder / "squad"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set CALIBTIP_TEST_DATA to the folder with squad/")
    tokenizer, trained = load_tokenizer(str(folder / "model")), QuestionAnswering(str(folder / "model"))
    maker = WindowMaker(tokenizer, 256, 96)
    data = SquadData(maker, str(folder / "train-sample.json"), str(folder / "xquad-a.json"), samples)
    data.setup()
    trained.evaluation = data.evaluation
    return trained, data


def test_padding_to_256_or_384_gives_the_same_ranges_and_answers(data_folder, make_trainer):
    trained, data = real_data(data_folder, 16)
    few = data.evaluation.windows[:24]
    scales, answers = [], []
    for length in (256, 384):
        module = QuantizationModule(trained)
        calibration = [pad(data.calibration[i : i + 8], data.tokenizer, length) for i in (0, 8)]
        make_trainer(Calibration()).fit(module, DataLoader(calibration, batch_size=None))
        scales.append(
            torch.stack([q.scale[0] for layer in module.network.layers.values() for q in layer.input_quantizers])
        )
        batch = pad(few, data.tokenizer, length)
        with torch.no_grad():
            output = module(**batch)
        found = []
        for row, window in enumerate(few):
            logits = [o[row, : len(window)].numpy() for o in (output.start_logits, output.end_logits)]
            found.append(best_answer(data.evaluation.questions[window.question].context, [window], [tuple(logits)]))
        answers.append(found)
    # Sums round otherwise at another length: a value falls into the next bin, and where two ranges lose as much, one or
    # the other is found; so may an answer be. Padding that counted would change nine ranges of ten.
    other = (scales[0] / scales[1] - 1).abs() > 1e-4
    assert other.float().mean() < 0.1
    same = sum(first == second for first, second in zip(*answers, strict=True))
    assert same >= len(few) - 1 and len(set(answers[0])) > 12


def test_w8a8_with_all_products_quantized_keeps_the_scores(data_folder, tmp_path):
    folder = data_folder / "squad"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set CALIBTIP_TEST_DATA to the folder with squad/")
    recipe.main(
        str(folder / "model"),
        str(folder / "train-sample.json"),
        str(first_questions(folder, tmp_path, 100)[0]),
        pipeline="calibrate",
        scheme=QuantizationScheme(8, 8),
        calibration_samples=64,
        max_length=256,
        doc_stride=96,
        accelerator="cpu",
        output=tmp_path / "run",
    )
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    # Three questions of a hundred: some lie so close that 8 bits, or another CPU's sums, decide otherwise.
    assert record["float"] > 0.6 and record["quantized"] >= record["float"] - 0.03
    assert record["exact_match"]["quantized"] >= record["exact_match"]["float"] - 0.03
    lines = {line["name"]: line for line in record["layers"]}
    products = [name for name in lines if name.endswith("_product")]
    assert len(products) == 12 and all(lines[name]["activation_bits"] == 8 for name in products)
    assert sum(line["weight_bits"] == 8 for line in lines.values()) == 40
    floats = [name for name, line in lines.items() if (line["weight_bits"], line["activation_bits"]) == (None, None)]
    assert len(floats) == 13 and all(name.endswith("LayerNorm") for name in floats)
