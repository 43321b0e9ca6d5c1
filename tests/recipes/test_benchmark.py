import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from lightning_calibtip import AdaQuantOptions
from recipes.benchmark import __main__ as benchmark
from recipes.benchmark import scale
from recipes.benchmark.accuracy import DEFAULT, KINDS, RANGES, AccuracySubject, measure_accuracy, summarize
from recipes.benchmark.allocation import measure_correlation, measure_replay
from recipes.benchmark.figure import accuracy_figure, benchmark_figure
from recipes.benchmark.growth import count_passes
from recipes.benchmark.samples import fine_tune, measure_samples
from recipes.benchmark.stages import measure_stages
from recipes.benchmark.step import SHAPES, measure_step
from recipes.resnet_cifar10.data import CifarData
from recipes.resnet_cifar10.model import CifarClassifier
from tests.conftest import TinyClassifier
from tests.networks import as_loader

RESULTS = {
    "growth": [
        {"model": f"resnet{n}", "units": n, "parallel_seconds": n, "sequential_seconds": 1.1 * n, "passes": 2.5}
        for n in (20, 32)
    ],
    "step": [{"shape": shape, "float_seconds": 0.01, "step_seconds": 0.02, "ratio": 2.0} for shape in SHAPES],
    "memory": [
        {"samples": n, "captured_bytes": n * 10**6, "budget_bytes": 10**8, "peak_bytes": 10**8} for n in (256, 512)
    ],
    "stages": [
        {"stage": "Calibration", "seconds": 1.0, "over_adaquant": 0.1},
        {"stage": "AdaQuant", "seconds": 9.0, "over_adaquant": 1},
    ],
    "samples": [
        {"method": method, "samples": n, "top1": 0.5} for n in (16, 64) for method in ("AdaQuant", "fine-tuning")
    ],
    "price": {"ratio": 1.0},
}


def test_passes_over_the_whole_network_are_at_most_four_and_do_not_grow():
    shallow, deep = count_passes(1), count_passes(3)
    assert 2 < shallow < 4 and abs(deep - shallow) < 0.1


def test_peak_memory_stays_within_the_budget_plus_a_fifth():
    budget = 160 * 2**20
    command = [sys.executable, "-m", "recipes.benchmark.memory", "--samples", "2048", "--budget", str(budget)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = json.loads(output.splitlines()[-1])
    print(row)
    assert row["captured_bytes"] >= 5 * budget
    assert row["peak_bytes"] <= 1.2 * budget


def test_bit_allocation_is_measured(tmp_path, monkeypatch, tiny_cifar, cifar_checkpoint):
    monkeypatch.setattr(benchmark, "measure_replay", lambda: measure_replay("resnet20", samples=4))
    short = partial(measure_correlation, samples=16, allocations=3, iterations=1)
    monkeypatch.setattr(benchmark, "measure_correlation", short)
    benchmark.allocation(tmp_path, data=str(tiny_cifar), checkpoint=cifar_checkpoint)
    results = json.loads((tmp_path / "allocation.json").read_text())
    assert {row["solver"] for row in results["solver"]} >= {"cbc"}
    assert all(row["proved"] and row["layers"] == 1000 and row["candidates"] == 12 for row in results["solver"])
    best = min(row["objective"] for row in results["solver"])
    assert all(row["objective"] <= best * 1.011 for row in results["solver"])
    assert results["sensitivity"]["measurements"] == 1 + 18 * 2
    assert len(results["correlation"]["predicted"]) == len(results["correlation"]["measured"]) == 3
    assert -1 <= results["correlation"]["spearman"] <= 1


def test_a_part_writes_its_rows_and_leaves_the_others_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_step", lambda: measure_step(steps=2, rounds=1))
    benchmark.reconstruction(tmp_path, only="step")
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(results) == ["growth", "step", "stages", "memory", "samples", "price"]
    assert [row["shape"] for row in results["step"]] == list(SHAPES)
    assert all(row["ratio"] > 0 and row["float_seconds"] > 0 for row in results["step"])
    assert not any(results[part] for part in results if part != "step")
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_bad_parts_and_missing_data_are_errors_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("CALIBTIP_TEST_DATA", raising=False)
    with pytest.raises(ValueError, match=r"only must name parts of growth, step, .* got 'speed'"):
        benchmark.reconstruction(tmp_path, only="step,speed")
    with pytest.raises(ValueError, match=r"samples, price need --data and .* --only growth,step"):
        benchmark.reconstruction(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_figure_has_a_panel_for_each_part():
    figure = benchmark_figure(RESULTS)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 5 and all(titles)
    assert len(benchmark_figure({**RESULTS, "growth": [], "memory": []}).axes) == 3


def test_samples_are_measured_for_both_methods(tiny_cifar, cifar_checkpoint, monkeypatch):
    monkeypatch.setattr("recipes.benchmark.samples.SAMPLES", (16,))
    monkeypatch.setattr("recipes.benchmark.samples._FINE_TUNING_STEPS", 2)
    from lightning_calibtip import AdaQuant

    monkeypatch.setattr("recipes.benchmark.samples.AdaQuant", lambda: AdaQuant(iterations=2))
    rows = measure_samples(cifar_checkpoint, str(tiny_cifar), "test", 1e-3)
    assert [(row["method"], row["samples"]) for row in rows] == [("AdaQuant", 16), ("fine-tuning", 16)]
    assert all(0 <= row["top1"] <= 1 for row in rows)


def test_accuracy_is_measured_over_seeds_and_goes_on_where_it_ended(tiny_cifar, cifar_checkpoint, tmp_path):
    data = CifarData(str(tiny_cifar), 16)
    data.setup()
    held = [torch.randn(4, 3, 32, 32)]
    options = AdaQuantOptions(iterations=2, batch_size=4)
    trained = CifarClassifier("resnet20", cifar_checkpoint)
    subject = AccuracySubject("resnet20", "top1", trained, data, held, options)
    kinds = [RANGES, DEFAULT, DEFAULT._replace(rounding="feedback", granularity="layer", equalized=False)]
    rows = measure_accuracy(subject, ["W4A4"], kinds[:2], 2, tmp_path / "accuracy.json")
    assert [(row["kind"], row["seed"]) for row in rows] == [("ranges", 0), (str(DEFAULT), 0), (str(DEFAULT), 1)]
    assert rows[1]["divergence"] != rows[2]["divergence"] and min(row["divergence"] for row in rows) > 0
    assert rows[1]["seconds"].keys() == {"Calibration", "Equalization", "BatchNormTuning", "AdaQuant", "BiasTuning"}
    assert not any(layer.is_parametrized for layer in trained.modules() if hasattr(layer, "is_parametrized"))
    again = measure_accuracy(subject, ["W4A4"], kinds, 1, tmp_path / "accuracy.json")
    assert again[:3] == rows and again[3]["kind"] == "feedback, layers"
    lines = summarize(again)
    assert [(line["kind"], line["seeds"]) for line in lines] == [
        ("ranges", 1),
        (str(DEFAULT), 2),
        ("feedback, layers", 1),
    ]
    assert lines[0]["metric_error"] is None and lines[1]["divergence_error"] > 0
    assert accuracy_figure(lines).axes[0].get_title() == "resnet20"


def test_unknown_kinds_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"kinds must be of ranges; .*got 'rounds'"):
        benchmark.accuracy(tmp_path, kinds="ranges;rounds")
    with pytest.raises(ValueError, match=r"networks must name parts of resnet20, .* got 'resnet21'"):
        benchmark.accuracy(tmp_path, networks="resnet21")
    with pytest.raises(ValueError, match="bits must be written like W4A8, got '4'"):
        benchmark.accuracy(tmp_path, bits="W4A4,4")
    assert len({str(kind) for kind in KINDS}) == len(KINDS) == 14


def test_every_stage_has_its_share(tmp_path):
    rows = measure_stages(samples=25, side=32, iterations=2)
    assert rows[0]["stage"] == "Calibration" and rows[0]["over_float"] > 0 and rows[0]["over_float_of_many"] > 0
    (adaquant,) = (row for row in rows if row["stage"] == "AdaQuant")
    assert 0 < adaquant["outside_steps"] < 1


def test_fine_tuning_learns_the_labels_of_its_images():
    from lightning_calibtip import Calibration, QuantizationModule
    from lightning_calibtip.pipeline.runner import run_stages

    torch.manual_seed(2)
    net = TinyClassifier().eval()
    labels = torch.arange(64) % 4
    # Classes that differ in brightness: labels without a rule are learned or not by chance.
    images = 0.3 * torch.randn(64, 1, 8, 8) + (labels - 1.5).view(-1, 1, 1, 1)
    module = QuantizationModule(net, weight_bits=4)
    run_stages(module, [Calibration()], as_loader(*images.split(16)))

    def loss():
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(module(images), labels))

    before = loss()
    fine_tune(module, images, labels, rate=1e-2)
    assert loss() < 0.5 * before


def test_the_time_of_stages_is_set_beside_their_laws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "SIZES", (("resnet20", 8),))
    monkeypatch.setattr(scale, "DEPTHS", {"resnet20": 1})
    benchmark.scale(tmp_path, steps=2)
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == [
        "Calibration", "Equalization", "BatchNormTuning", "AdaQuant, sequential", "BiasTuning", "AdaQuant, parallel",
        "sensitivity",
    ]  # fmt: skip
    by_stage = {row["stage"]: row for row in rows}
    # Two steps of all 8 samples are 2 passes; each of 6 layers at 3 candidates is half a pass.
    assert by_stage["AdaQuant, parallel"]["law"] == 3 and by_stage["sensitivity"]["law"] == 9
    assert all(row["passes"] > 0 and row["factor"] > 0 for row in rows)
    assert "| AdaQuant, sequential |" in capsys.readouterr().out
