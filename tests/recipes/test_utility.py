import json

import pytest
import torch

from lightning_calibtip import Utility
from recipes.benchmark.costs import costs_table, measure_costs
from recipes.command_line import run_recipe
from recipes.utility.__main__ import main
from recipes.utility.subjects import SUBJECTS, cost_matrix, load_subject


def test_it_quantizes_by_its_matrix_and_writes_result_and_report(tmp_path):
    words = ["--subject=cancer", f"--output={tmp_path}", "--pipeline=mixed", "--allocation.compression=0.12",
             "--allocation.candidates=[2, 3]", "--allocation.checks=1", "--edge_bits=null", "--adaquant.iterations=1",
             "--preparation.iterations=1", "--bias_tuning.epochs=1", "--accelerator=cpu", "--target=null"]  # fmt: skip
    run_recipe(main, words)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["recipe"] == "utility" and record["metrics"]["accuracy"]["float"] > 0.9
    assert record["stages"][-1]["name"] == "DecisionCosts" and "realised_cost" in record["stages"][-1]["figures"]
    assert (tmp_path / "report.html").exists() and (tmp_path / "quantized.ckpt").exists()


def test_another_matrix_is_taken_from_the_command_line_and_a_wrong_one_is_refused(tmp_path, capsys):
    words = ["--subject=cancer", "--pipeline=calibrate", "--accelerator=cpu", f"--output={tmp_path}"]
    run_recipe(main, [*words, "--utility.matrix=[[0, 2], [3, 0]]"])
    assert '"confusion_labels"' in (tmp_path / "result.json").read_text()
    with pytest.raises(SystemExit):
        run_recipe(main, [*words, "--utility.matrix=[[0, 2], [-3, 0]]"])
    assert "matrix[1][0] is -3.0" in capsys.readouterr().err


def test_matrices_are_utilities_whose_dear_mistakes_are_the_ones_that_are_said():
    for name in SUBJECTS:
        assert len(Utility(cost_matrix(name)).table) == (2 if name == "cancer" else 10)
    table = torch.tensor(cost_matrix("cifar10"))
    cat, truck, dog, ship = 3, 9, 5, 8
    assert [table[truck, cat], table[cat, truck], table[cat, dog], table[ship, truck]] == pytest.approx(
        [10, 5, 0.1, 0.1]
    )


def test_test_samples_are_neither_trained_nor_calibrated_on():
    subject = load_subject("cancer", 0)
    calibration, test = (torch.cat([x for x, _ in each]) for each in (subject.calibration, subject.evaluation))
    assert len(calibration) == 369 and len(test) == 200
    assert not (calibration.unsqueeze(1) == test).all(-1).any()
    held = load_subject("cancer", 0, "train")
    assert len(held.calibration.dataset) + len(held.evaluation.dataset) == 369
    with pytest.raises(ValueError, match="cifar10 needs data"):
        load_subject("cifar10", 0)


def test_both_methods_are_compared_within_one_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.benchmark.costs.CHECKS", 2)
    rows = measure_costs("cancer", 1, tmp_path, "train", None)
    assert [row["method"] for row in rows] == ["float", "kl", "cost"]
    weights = 30 * 16 + 12 * 16 * 16 + 16 * 2
    assert all(row["bytes"] <= 3 * weights / 8 + 1 for row in rows if row["method"] != "float")
    assert json.loads((tmp_path / "costs-cancer.json").read_text())["rows"] == rows
    assert "cancer" in costs_table(rows)
