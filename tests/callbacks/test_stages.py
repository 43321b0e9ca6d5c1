import logging

import pytest
import torch
import wandb as wandb_module
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
from lightning_calibtip.callbacks.stage import StageResult

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
            return StageResult({"samples": float(self.samples)})

    stage = Count()
    make_trainer(stage).fit(QuantizationModule(tiny_classifier), loader)
    assert stage.samples == 48 and stage.result.figures == {"samples": 48.0} and stage.result.items == []


def test_a_stage_that_returns_something_else_says_what_is_wanted(tiny_classifier, loader, make_trainer):
    class Wrong(Stage):
        def run(self, module):
            return {"samples": 1.0}

    with pytest.raises(TypeError, match=r"Wrong\.run must return a StageResult\(figures, items\), got dict"):
        make_trainer(Wrong()).fit(QuantizationModule(tiny_classifier), loader)


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "lp"])
def test_every_observer_calibrates(observer, tiny_classifier, loader, images, make_trainer):
    module = QuantizationModule(tiny_classifier)
    make_trainer(Calibration(observer=observer, weight_observer=observer)).fit(module, loader)
    with torch.no_grad():
        torch.testing.assert_close(module(images), tiny_classifier(images), rtol=0.1, atol=0.1)
        assert not torch.equal(module(images), tiny_classifier(images))


def test_moving_average_is_that_of_the_batches(tiny_classifier, loader, images, make_trainer):
    module = QuantizationModule(tiny_classifier)
    make_trainer(Calibration(observer="moving_average", momentum=0.5)).fit(module, loader)
    low, high = 0.0, 0.0
    for index, batch in enumerate(images.split(16)):
        weight = 0.5 if index else 1.0
        low += weight * (float(batch.min()) - low)
        high += weight * (float(batch.max()) - high)
    on_input = module.network.layers["net.stem"].input_quantizers[0]
    assert float(on_input.scale) == pytest.approx((high - low) / 255, rel=1e-4)


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
    stage = BitAllocation(compression=[0.1, 0.2], candidates=[2, 4, 8], checks=0)
    trainer = make_trainer(Calibration(), stage, logger=[board, wandb, CSVLogger(tmp_path / "csv")])
    trainer.fit(QuantizationModule(tiny_classifier), loader)
    wandb.experiment.finish()
    # Only this waits until W&B's service has written its files.
    wandb_module.teardown()
    names = {"allocation", "sensitivity", "trade_off"}
    assert {item.name for item in stage.result.items} == names
    assert board.figures.keys() == {f"BitAllocation/{name}" for name in names}
    assert "net.blocks.0.conv1" in caplog.text and "rise of the loss alone" in caplog.text
    media = next((tmp_path / "wandb").glob("offline-run-*")) / "files" / "media"
    assert len(list(media.rglob("*.png"))) == len(list(media.rglob("*.table.json"))) == 3
