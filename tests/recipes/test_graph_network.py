import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("torch_geometric")

from recipes.benchmark.graphs import GraphKind, graph_table, measure_graphs
from recipes.graph_network.data import digits_graph, graph_loaders
from recipes.graph_network.model import GraphNetwork, make_layer, train


def test_the_recipe_trains_and_quantizes_three_networks(tmp_path):
    command = [sys.executable, "-m", "recipes.graph_network", "--epochs", "3", "--adaquant.iterations", "2"]
    command += ["--accelerator", "cpu", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name, layer in (("gcn", "layers.0.lin"), ("gat", "layers.1.factor_alpha"), ("gin", "layers.1.aggregates")):
        record = json.loads((tmp_path / name / "result.json").read_text())
        assert (record["recipe"], record["model"]) == ("graph_network", f"{name}, digits")
        assert layer in [each["name"] for each in record["layers"]] and layer in done.stdout
        assert record["calibration_samples"] == 1000 and len(record["stages"]) == 5
        for file in ("quantized.ckpt", "report.html"):
            assert (tmp_path / name / file).stat().st_size > 1000


def test_the_digits_are_one_graph_whose_test_nodes_are_apart_from_what_settings_are_chosen_on():
    graph = digits_graph()
    assert graph.num_nodes == 1797 and torch.equal(graph.edge_index.flip(0).unique(dim=1), graph.edge_index)
    degrees = torch.bincount(graph.edge_index[1])
    assert int(degrees.min()) >= 8 and int(degrees.max()) > 2 * float(degrees.float().mean())
    (test,), (choice,) = (list(graph_loaders("digits", split).train) for split in ("test", "train"))
    assert int(test.train_mask.sum()) == 1000 and int(test.val_mask.sum()) == 797
    assert int(choice.train_mask.sum()) == 600 and int(choice.val_mask.sum()) == 400
    for mask in (choice.train_mask, choice.val_mask, test.train_mask):
        assert not bool((mask & test.val_mask).any())


def test_molecules_have_a_descriptor_to_predict():
    pytest.importorskip("rdkit")
    loaders = graph_loaders("molecules", "train")
    molecules = [*loaders.train.dataset, *loaders.validation.dataset]
    assert len(loaders.train.dataset) == 3000 and len(loaders.validation.dataset) == 500
    assert all(bool(torch.isfinite(each.y).all()) and each.num_edges > 0 for each in molecules[:200])
    assert len({float(each.y) for each in molecules[:200]}) > 150
    batch = next(iter(loaders.train))
    assert GraphNetwork("sage", loaders.features, 1)(batch).shape == (64, 1)


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"model must be gcn, gat, gin or sage, got 'gnn'"):
        make_layer("gnn", 2, 2)
    with pytest.raises(ValueError, match=r"data must be digits or molecules, .* got 'cora'"):
        graph_loaders("cora")


def test_the_benchmark_keeps_rows_and_prints_shares(tmp_path):
    kinds = (GraphKind("MSE ranges", 8), GraphKind("MSE ranges", 3))
    rows = measure_graphs("digits", ["gin"], 1, "train", tmp_path / "graphs.json", kinds)
    assert [(row["bits"], row["float_products"]) for row in rows] == [(8, []), (3, [])]
    assert rows[0]["float"] > 0.8 and abs(rows[0]["metric"] - rows[0]["float"]) < 0.05
    again = measure_graphs("digits", ["gin"], 1, "train", tmp_path / "graphs.json", kinds)
    assert again == rows and "| gin, digits | W3A3 | MSE ranges |" in graph_table(rows)


def test_training_depends_on_the_seed_alone():
    loaders = graph_loaders("digits")
    first, second = (train("gcn", loaders, 2, 0, "cpu").head.weight for _ in range(2))
    assert torch.equal(first, second)
