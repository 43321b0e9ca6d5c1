"""What mistakes cost, through every stage and pipeline that takes it."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibtip import (
    AdaQuant,
    AllocationOptions,
    BiasTuning,
    BitAllocation,
    Calibration,
    DecisionCosts,
    Diagnosis,
    QuantizationModule,
    Utility,
    make_stages,
    quantize,
    run_stages,
)
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.callbacks.decision_costs import labels_of

MATRIX = [[0, 1], [20, 0]]
CPU = {"accelerator": "cpu"}


class Tumours(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(30, 16), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Linear(16, 16), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(16, 2))

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def tumours():
    """A trained network, calibration and validation loaders of scikit-learn's breast cancer."""
    data = load_breast_cancer()
    torch.manual_seed(0)
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    x = (x - x.mean(0)) / x.std(0)
    order = torch.randperm(len(x))
    x, y, model = x[order], y[order], Tumours()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(10):
        for rows in torch.arange(300).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    loaders = [DataLoader(TensorDataset(*(t[rows] for t in (x, y))), 50) for rows in (slice(300), slice(300, None))]
    return model.eval(), *loaders


def test_realised_costs_are_those_of_the_validation_labels(tumours):
    model, calibration, validation = tumours
    stage = DecisionCosts(Utility(MATRIX))
    module = QuantizationModule(model, weight_bits=2, activation_bits=3, edge_bits=None)
    run = run_stages(module, [Calibration(), stage], calibration, validation, CPU)
    expected, realised = stage.decisions
    table = torch.tensor(MATRIX, dtype=torch.float32)
    for place, quantized in enumerate((False, True)):
        with torch.no_grad(), run.module.quantized(quantized):
            pairs = [(run.module(x).softmax(1), y) for x, y in validation]
        hand = torch.cat([table[(p @ table.T).argmin(1), y] for p, y in pairs]).mean()
        assert abs(realised.costs[place] - float(hand)) < 1e-5
    assert realised.samples == 269 and expected.samples == 300 and realised.changed > 0
    assert run.stages[-1].figures["realised_cost"] == realised.costs[1]
    assert {"decision_costs", "confusion_labels", "confusion_probabilities"} <= {item.name for item in run.items}


def test_without_labels_the_report_says_so(tumours):
    model, calibration, _ = tumours
    unlabelled = DataLoader(torch.cat([x for x, _ in calibration]), 50)
    module = QuantizationModule(model, weight_bits=4, validation_step=lambda module, batch, index: module(batch))
    run = run_stages(module, [Calibration(), DecisionCosts({"matrix": MATRIX})], unlabelled, unlabelled, CPU)
    assert "realised_cost" not in run.stages[-1].figures
    assert "No validation batch had labels" in run.stages[-1].outcome


def test_a_pipeline_s_utility_reaches_every_stage_that_minimises_a_loss():
    utility = Utility(MATRIX)
    stages = make_stages("mixed", {"utility": {"matrix": MATRIX}})
    assert [stage.name for stage in stages][-1] == "DecisionCosts"
    options = {stage.name: stage.options for stage in stages if hasattr(stage, "options")}
    assert all(stage.options.loss == utility for stage in stages if isinstance(stage, AdaQuant))
    assert options["BitAllocation"].metric == options["BiasTuning"].divergence == utility
    own = make_stages("mixed", {"utility": {"matrix": MATRIX}, "allocation": {"metric": "mse"}})
    assert next(stage.options.metric for stage in own if isinstance(stage, BitAllocation)) == "mse"
    with pytest.raises(ValueError, match=r"matrix\[0\]\[1\] is -1.0"):
        make_stages("mixed", {"utility": {"matrix": [[0, -1], [1, 0]]}})
    with pytest.raises(TypeError, match="unknown option 'matrx'; did you mean 'matrix'"):
        make_stages("mixed", {"utility": {"matrx": MATRIX}})


def test_every_pipeline_runs_and_reports_with_a_utility(tumours, tmp_path):
    model, calibration, validation = tumours
    options = {
        "utility": {"matrix": MATRIX}, "adaquant": {"iterations": 5}, "preparation": {"iterations": 3},
        "bias_tuning": {"epochs": 1}, "allocation": {"compression": 0.12, "candidates": [2, 3, 8], "checks": 3},
    }  # fmt: skip
    run = quantize(model, calibration, validation, "mixed", options, weight_bits=4, edge_bits=None, trainer_options=CPU)
    record = run.record("test", "tumours", "accuracy", 0)
    run.write_report(tmp_path, record)
    figures = json.loads((tmp_path / "result.json").read_text())["stages"][-1]["figures"]
    assert set(figures) == {"expected_cost_float", "expected_cost", "realised_cost_float", "realised_cost"}
    assert "By the labels of 269 samples" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "confusion_labels.csv").read_text().startswith("model,decision,truth 0,truth 1")
    found = run.diagnose()
    assert found.loss.startswith("cost#") and found.float_loss > 0
    assert run.diagnose(loss="kl").loss == "kl"


@pytest.mark.parametrize(
    "stage",
    [
        BitAllocation(metric={"matrix": [[0, 1, 1], [1, 0, 1], [2, 2, 0]]}, compression=0.2),
        BiasTuning(divergence=Utility([[0, 1, 1], [1, 0, 1], [2, 2, 0]])),
        AdaQuant(loss=Utility([[0, 1, 1], [1, 0, 1], [2, 2, 0]])),
        Diagnosis(loss=Utility([[0, 1, 1], [1, 0, 1], [2, 2, 0]])),
        DecisionCosts(Utility([[0, 1, 1], [1, 0, 1], [2, 2, 0]])),
    ],
    ids=lambda stage: stage.name,
)
def test_a_matrix_of_another_number_of_classes_is_refused_on_the_first_batch(tumours, stage):
    model, calibration, _ = tumours
    first = Calibration()
    with pytest.raises(ValueError, match=r"the matrix has 3 classes, and the model gives an output of shape \(50, 2\)"):
        run_stages(QuantizationModule(model, weight_bits=4), [first, stage], calibration, None, CPU)
    # Nothing had run by then.
    assert first.seconds == 0


def test_allocation_reports_the_expected_cost_and_chooses_by_the_divergence_of_decisions(tumours):
    model, calibration, _ = tumours
    module = QuantizationModule(model, weight_bits=3, activation_bits=None, edge_bits=None)
    stage = BitAllocation(metric=Utility(MATRIX), candidates=[2, 3, 4], compression=3 / 32, checks=8)
    kept = []

    class Keeps(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept.extend(pl_module.calibration.batches)

    run = run_stages(module, [Calibration(), stage], calibration, None, {**CPU, "callbacks": [Keeps()]})
    network, chosen = run.module.network, stage.allocation.chosen
    from lightning_calibtip.calibration.calibration_set import CalibrationSet

    calibration_set = CalibrationSet(run.module.calibration_step)
    calibration_set.batches.extend(kept[:6])
    loss = Loss(network, calibration_set, Utility(MATRIX))
    measured = loss()
    for name in network.searchable_layers:
        network.switch(name, network.scheme.bit_widths(4, "base"))
    assert measured - loss() == pytest.approx(chosen.measured_loss, abs=1e-5)
    assert math.isnan(chosen.predicted_loss) and "was predicted" not in run.stages[-1].outcome
    assert stage.allocation.sensitivity.conditions.metric.startswith("decisions#")
    assert stage.allocation.metric.startswith("cost#") and chosen.compression <= 3 / 32 + 1e-9


def test_the_smallest_model_within_a_cost_is_found(tumours):
    model, calibration, _ = tumours
    module = QuantizationModule(model, weight_bits=3, activation_bits=None, edge_bits=None)
    stage = BitAllocation(
        metric=Utility(MATRIX), candidates=[2, 4, 8], compression=None, minimise="compression", max_loss=0.05, checks=16
    )
    run_stages(module, [Calibration(), stage], calibration, None, CPU)
    chosen = stage.allocation.chosen
    assert chosen.measured_loss <= 0.05 and chosen.compression < 0.25


def test_bias_tuning_minimises_kl_and_the_cost(tumours):
    """A shift of the last bias, which costs much and which KL alone would also mend, is taken back."""
    model, calibration, _ = tumours

    class Shift(Calibration):
        def run(self, module):
            result = super().run(module)
            with torch.no_grad():
                list(module.network.layers.values())[-1].bias.add_(torch.tensor([-2.0, 2.0]))
            return result

    module = QuantizationModule(model, weight_bits=8, activation_bits=8)
    stages = [Shift(), DecisionCosts(Utility(MATRIX)), BiasTuning(divergence=Utility(MATRIX), rate=0.05, epochs=8)]
    last = DecisionCosts(Utility(MATRIX))
    run_stages(module, [*stages, last], calibration, None, CPU)
    figures = stages[2].figures
    # KL would be 0 for a perfect model; the logarithm of what is left to the largest cost is below that.
    assert figures["divergence_after"] < figures["divergence_before"] - 0.02
    assert figures["divergence_after"] < -1
    assert last.decisions[0].rise < 0.5 * stages[1].decisions[0].rise


@pytest.mark.parametrize("loss", ["kl", "mse", Utility(MATRIX)], ids=["kl", "mse", "cost"])
def test_adaquant_is_weighted_by_a_divergence_without_labels_and_repeats_itself(tumours, loss):
    model, calibration, _ = tumours
    inputs = DataLoader(torch.cat([x for x, _ in calibration]), 50)

    def weights(**options):
        module = QuantizationModule(model, weight_bits=2, activation_bits=None, edge_bits=None)
        run_stages(module, [Calibration(), AdaQuant(iterations=20, granularity="layer", **options)], inputs, None, CPU)
        return torch.cat([layer.weight.flatten() for layer in module.network.layers.values()])

    weighted = weights(loss=loss)
    assert torch.equal(weighted, weights(loss=loss)) and not torch.equal(weighted, weights())


def test_labels_are_what_a_batch_holds_of_whole_numbers():
    x = torch.zeros(3, 2)
    assert labels_of((x, torch.tensor([[1.0], [0.0], [1.0]]))).flatten().tolist() == [1, 0, 1]
    assert labels_of((x, torch.tensor([0.5, 1.0, 0.0]))) is None


def test_a_limit_of_the_cost_needs_choices_to_be_measured():
    with pytest.raises(ValueError, match="checks=0 cannot keep max_loss with this metric"):
        AllocationOptions(minimise="weight_bytes", max_loss=0.1, checks=0, metric=Utility([[0, 1], [2, 0]]))
