import logging

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lightning_calibtip import (
    AdaQuant,
    BatchNormTuning,
    BiasTuning,
    BitAllocation,
    Calibration,
    QuantizationModule,
    Stage,
)
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.tuning.batch_norm import tune_batch_norm

ALL = [
    Calibration,
    lambda: AdaQuant(mode="parallel", granularity="layer", iterations=3, candidates=[2, 8]),
    lambda: BitAllocation(compression=0.2, candidates=[2, 8]),
    BatchNormTuning,
    lambda: BiasTuning(epochs=1),
]


def weights(module):
    return {name: layer.weight.clone() for name, layer in module.network.layers.items()}


def test_stages_run_in_list_order_in_one_fit(tiny_classifier, loader, make_trainer):
    order = []

    def recording(stage):
        run = stage.run
        stage.run = lambda module: order.append(stage.name) or run(module)
        return stage

    stages = [recording(make()) for make in ALL]
    make_trainer(*stages).fit(QuantizationModule(tiny_classifier), loader)
    assert order == ["Calibration", "AdaQuant", "BitAllocation", "BatchNormTuning", "BiasTuning"]
    assert all(stage.seconds > 0 for stage in stages)


def test_stages_one_by_one_give_the_same_as_together(tiny_classifier, loader, make_trainer):
    together = QuantizationModule(tiny_classifier, weight_bits=4, activation_bits=4)
    make_trainer(*(make() for make in ALL)).fit(together, loader)
    alone = QuantizationModule(tiny_classifier, weight_bits=4, activation_bits=4)
    for make in ALL:
        make_trainer(make()).fit(alone, loader)
    for name, weight in weights(together).items():
        assert torch.equal(weight, weights(alone)[name]), name


@pytest.mark.parametrize("make", ALL[1:], ids=["AdaQuant", "BitAllocation", "BatchNormTuning", "BiasTuning"])
def test_a_stage_before_calibration_says_so(make, tiny_classifier, loader, make_trainer):
    with pytest.raises(RuntimeError, match="run Calibration first"):
        make_trainer(make()).fit(QuantizationModule(tiny_classifier), loader)


def test_stage_on_a_plain_module_says_what_to_do(tiny_classifier, loader, make_trainer):
    with pytest.raises(
        MisconfigurationException, match=r"Calibration works on a QuantizationModule, got TinyClassifier"
    ):
        make_trainer(Calibration()).fit(tiny_classifier, loader)


def test_figures_go_to_every_logger(tiny_classifier, loader, make_trainer, tmp_path):
    loggers = [CSVLogger(tmp_path, name=name) for name in "ab"]
    make_trainer(Calibration(), AdaQuant(iterations=2), logger=loggers).fit(QuantizationModule(tiny_classifier), loader)
    for logger in loggers:
        logger.save()
        text = (tmp_path / logger.name / "version_0" / "metrics.csv").read_text()
        assert "AdaQuant/error_after" in text and "Calibration/seconds" in text


def test_own_stage_needs_only_run(tiny_classifier, loader, make_trainer):
    class Count(Stage):
        def run(self, module):
            self.samples = module.calibration.samples
            return {"samples": float(self.samples)}

    stage = Count()
    make_trainer(stage).fit(QuantizationModule(tiny_classifier), loader)
    assert stage.samples == 48


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "lp"])
def test_every_observer_calibrates(observer, tiny_classifier, loader, images, make_trainer):
    module = QuantizationModule(tiny_classifier)
    make_trainer(Calibration(observer, observer)).fit(module, loader)
    with torch.no_grad():
        torch.testing.assert_close(module(images), tiny_classifier(images), rtol=0.1, atol=0.1)
        assert not torch.equal(module(images), tiny_classifier(images))


def test_moving_average_is_that_of_the_batches(tiny_classifier, loader, images, make_trainer):
    module = QuantizationModule(tiny_classifier)
    make_trainer(Calibration("moving_average", momentum=0.5)).fit(module, loader)
    low, high = 0.0, 0.0
    for index, batch in enumerate(images.split(16)):
        weight = 0.5 if index else 1.0
        low += weight * (float(batch.min()) - low)
        high += weight * (float(batch.max()) - high)
    on_input = module.network.layers["net.stem"].inputs[0]
    assert float(on_input.scale) == pytest.approx((high - low) / 255, rel=1e-4)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Calibration("entropy"), "observer must be one of"),
        (lambda: Calibration(weight_observer="x"), "weight_observer must be one of"),
        (lambda: Calibration("percentile", percentile=10), "percentile must be above 50"),
        (lambda: Calibration("moving_average", momentum=0), "momentum must be above 0"),
        (lambda: AdaQuant(mode="serial"), "mode must be one of parallel, sequential"),
        (lambda: AdaQuant(granularity="net"), "granularity must be one of layer, block"),
        (lambda: AdaQuant(candidates=[4, 8]), 'need mode="parallel"'),
        (lambda: AdaQuant(mode="parallel", candidates=[1]), "candidates must be an integer from 2 to 16, got 1"),
        (lambda: AdaQuant(iterations=0), "iterations must be an integer of at least 1, got 0"),
        (lambda: AdaQuant(iterations=2.5), "iterations must be an integer of at least 1, got 2.5"),
        (lambda: AdaQuant(blocks="layer1"), "blocks must be a list of names or patterns, got 'layer1'"),
        (lambda: AdaQuant(loss=3), "loss must be a function"),
        (lambda: AdaQuant(rounding="up"), "rounding must be one of straight_through, learned, got 'up'"),
        (lambda: AdaQuant(drop_probability=1.5), "drop_probability must be from 0 to 1, got 1.5"),
        (lambda: AdaQuant(activation_budget="much"), "activation_budget must be a positive number of bytes"),
        (lambda: AdaQuant(storage="int8"), "storage must be one of float32, bfloat16, got 'int8'"),
        (lambda: BitAllocation(compression=0), "compression must be above 0, got 0"),
        (lambda: BitAllocation(compression=1.5), "compression must be at most 1, got 1.5"),
        (lambda: BitAllocation(compression=[0.1, 1.5]), "compression must be above 0 and at most 1, got 1.5"),
        (lambda: BitAllocation(compression=[]), "a list with at least one, got an empty list"),
        (lambda: BitAllocation(max_loss=0.1), "and none of the loss: max_loss goes with another minimise"),
        (lambda: BitAllocation(bit_operations="many"), "bit_operations must be a number, got 'many'"),
        (lambda: BitAllocation([0.1], pick_under=-1), "pick_under must be above 0 and at most 1, got -1"),
        (
            lambda: BitAllocation([0.1], max_degradation=float("nan")),
            "max_degradation must be a finite number, got nan",
        ),
        (lambda: BitAllocation(candidates=[]), "at least two different widths"),
        (lambda: BitAllocation(candidates=[4, 17]), "candidates must be an integer from 2 to 16, got 17"),
        (lambda: BitAllocation(weight_bytes="lots"), "weight_bytes must be a positive number of bytes"),
        (lambda: BitAllocation(max_degradation=0.1), "pick a point of a sweep"),
        (lambda: BitAllocation(checks=-1), "checks must be at least 0, got -1"),
        (lambda: BitAllocation(metric="top1"), "metric must be kl, mse or a function"),
        (lambda: BitAllocation(samples=0), "samples must be at least 1, got 0"),
        (lambda: BitAllocation(solver="glpk"), "solver must be one of cbc, highs, got 'glpk'"),
        (lambda: BitAllocation(latency=3.0), "latency needs a latency_table"),
        (lambda: BitAllocation(candidates=[4]), "at least two different widths"),
        (lambda: BatchNormTuning("gamma"), "reference must be one of"),
        (lambda: BiasTuning(epochs=0), "epochs must be at least 1"),
    ],
)
def test_bad_settings_raise_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_option_of_bit_allocation_reaches_the_program(
    tiny_classifier, loader, make_trainer, tmp_path, monkeypatch
):
    seen = {}

    def watching(network, calibration, candidates, goal, measurement, sweep, checks, store, evaluate, steps):
        seen.update(locals())
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_calibtip.callbacks.bit_allocation.allocate", watching)

    def metric(output, batch):
        return 0.0

    (tmp_path / "again.csv").touch()
    stage = BitAllocation(
        compression=[0.1, 0.2],
        candidates=[[2, 8], 4],
        weight_bytes="2kB",
        bit_operations=1e6,
        activation_bytes=300,
        latency=4.0,
        latency_table={"a": {4: 1.0}},
        max_loss=0.5,
        minimise="latency",
        groups=[["a", "b"]],
        agree_on_input=True,
        agree_on_add=True,
        metric=metric,
        samples=7,
        checks=3,
        pick_under=0.15,
        max_degradation=0.25,
        sensitivity=tmp_path / "again.csv",
        table=tmp_path / "table.csv",
        output_folder=tmp_path / "out",
        solver="cbc",
        time_limit=9.0,
        gap=0.01,
        activation_budget="5kB",
        scratch_folder=tmp_path,
    )
    with pytest.raises(KeyboardInterrupt):
        stage.run(QuantizationModule(tiny_classifier))
    assert seen["candidates"] == [(2, 8), (4, 4)] and seen["checks"] == 3
    goal, measurement, sweep = seen["goal"], seen["measurement"], seen["sweep"]
    costs = {"compression": 0.2, "weight_bytes": 2000, "bit_operations": 1e6, "activation_bytes": 300, "latency": 4.0}
    assert goal.limits == {**costs, "loss": 0.5} and goal.minimise == "latency"
    assert goal.latency_table == {"a": {4: 1.0}} and goal.groups == [["a", "b"]]
    assert goal.agree_on_input and goal.agree_on_add
    assert (goal.solver.name, goal.solver.time_limit, goal.solver.gap) == ("cbc", 9.0, 0.01)
    assert (measurement.metric, measurement.samples) == (metric, 7)
    assert (measurement.path, measurement.again) == (tmp_path / "table.csv", tmp_path / "again.csv")
    assert (sweep.compression, sweep.under, sweep.max_degradation) == ([0.1, 0.2], 0.15, 0.25)
    assert (seen["store"].budget, seen["store"].folder) == (5000, tmp_path)


class Board(Logger):
    """Takes figures as TensorBoard's logger does."""

    def __init__(self):
        super().__init__()
        self.figures = {}

    @property
    def experiment(self):
        return self

    def add_figure(self, key, figure, step):
        self.figures[key] = figure

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass

    @property
    def name(self):
        return "board"

    @property
    def version(self):
        return 0


def test_loggers_get_the_tables_and_pictures_that_they_can_take(
    tiny_classifier, loader, make_trainer, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "lightning_calibtip")
    board, wandb = Board(), WandbLogger(save_dir=tmp_path, project="test")
    stage = BitAllocation([0.1, 0.2], candidates=[2, 4, 8], checks=0)
    trainer = make_trainer(Calibration(), stage, logger=[board, wandb, CSVLogger(tmp_path / "csv")])
    trainer.fit(QuantizationModule(tiny_classifier), loader)
    wandb.experiment.finish()
    names = {"allocation", "sensitivity", "trade_off"}
    assert {exhibit.name for exhibit in stage.exhibits} == names
    assert board.figures.keys() == {f"BitAllocation/{name}" for name in names}
    assert "net.blocks.0.conv1" in caplog.text and "rise of the loss alone" in caplog.text
    media = next((tmp_path / "wandb").glob("offline-run-*")) / "files" / "media"
    assert len(list(media.rglob("*.png"))) == len(list(media.rglob("*.table.json"))) == 3


def test_papers_preset_takes_further_arguments():
    stage = AdaQuant.paper(mode="parallel", iterations=7)
    settings = stage.reconstruction.settings
    assert settings.iterations == 7 and settings.batch_size == 50 and not settings.relative


def test_every_option_of_adaquant_reaches_the_reconstruction(
    tiny_classifier, loader, make_trainer, tmp_path, monkeypatch
):
    seen = {}

    def watching(network, calibration, how, store, steps):
        seen.update(how=how, store=store)
        return adaquant(network, calibration, how, store, steps)

    monkeypatch.setattr("lightning_calibtip.callbacks.adaquant.adaquant", watching)
    options = {
        "iterations": 2, "batch_size": 7, "rounding": "learned", "drop_probability": 0.25, "weight_rate": 0.1,
        "bias_rate": 0.2, "weight_range_rate": 0.3, "input_range_rate": 0.4, "zero_point_rate": 0.5,
        "rounding_rate": 0.6, "rounding_strength": 0.7, "input_range_interval": 3, "relative": False,
        "schedule": "constant", "holdout": 0.2, "seed": 9,
    }  # fmt: skip

    def loss(output, batch):
        return output.square().sum()

    stage = AdaQuant(
        "parallel", "layer", ["net.blocks.0"], **options, loss=loss, activation_budget="2kB", storage="bfloat16",
        scratch_folder=tmp_path / "scratch", state_folder=tmp_path / "state",
    )  # fmt: skip
    make_trainer(Calibration(), stage).fit(QuantizationModule(tiny_classifier), loader)
    how, store = seen["how"], seen["store"]
    assert {name: getattr(how.settings, name) for name in options} == options
    assert (how.mode, how.granularity, how.blocks, how.loss) == ("parallel", "layer", ["net.blocks.0"], loss)
    assert (store.budget, store.precision, store.folder) == (2000, torch.bfloat16, tmp_path / "scratch")
    assert stage.figures["captured_bytes"] > 2000 and stage.figures["step_seconds"] > 0
    assert (tmp_path / "scratch").is_dir() and not list((tmp_path / "scratch").iterdir())
    assert len(list((tmp_path / "state").glob("*.pt"))) == stage.figures["units"] == 5
    stage.clean_up()
    assert not (tmp_path / "state").exists()


def test_batch_norm_tuning_keeps_to_its_budget(tiny_classifier, loader, make_trainer, tmp_path, monkeypatch):
    stores = []

    def watching(network, calibration, reference, store, steps):
        stores.append(store)
        return tune_batch_norm(network, calibration, reference, store, steps)

    monkeypatch.setattr("lightning_calibtip.callbacks.batch_norm_tuning.tune_batch_norm", watching)
    tuned = []
    for budget in (None, 1000):
        module = QuantizationModule(tiny_classifier, weight_bits=3)
        stage = BatchNormTuning(activation_budget=budget, scratch_folder=tmp_path / "scratch")
        make_trainer(Calibration(), stage).fit(module, loader)
        tuned.append([layer.bias for layer in module.network.layers.values()])
    assert stores[1].budget == 1000 and stores[1].most_held == stores[0].most_held > 1000
    assert all(torch.equal(a, b) for a, b in zip(*tuned, strict=True))
    assert not list((tmp_path / "scratch").iterdir())
