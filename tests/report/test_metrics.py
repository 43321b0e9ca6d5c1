"""What is known of metrics: which way is better, and their standard errors."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.regression import MeanSquaredError

from lightning_calibtip import quantize
from lightning_calibtip.report.metrics import Validation, better_higher, standard_error


@pytest.mark.parametrize(
    "name, expected",
    [
        ("val_loss", False),
        ("val/acc", True),
        ("valAccuracy", True),
        ("top5", True),
        ("mAP", True),
        ("map50", True),
        ("rmse", False),
        ("perplexity", False),
        ("f1", True),
        ("epoch", None),
        ("score", None),
        ("accuracy_loss", None),
        ("classes", None),
    ],
)
def test_words_in_the_name_tell_which_way_is_better(name, expected):
    assert better_higher(name) is expected


def test_the_users_own_word_comes_before_the_name():
    validation = Validation({"val_loss": True, "score": False})
    assert validation.is_better_higher("val_loss") is True
    assert validation.is_better_higher("score_epoch/dataloader_idx_1") is False


def test_samples_are_those_of_the_metrics_own_loader():
    validation = Validation(samples=[10, 20])
    assert validation.samples_of("acc/dataloader_idx_1") == 20
    assert validation.samples_of("acc") is None and Validation(samples=[10]).samples_of("acc") == 10


def test_the_standard_error_is_that_of_a_share_of_samples():
    draws = torch.rand(20_000, 400, generator=torch.Generator().manual_seed(0)) < 0.8
    assert standard_error("top1", [0.8], 400) == pytest.approx(float(draws.float().mean(1).std()), rel=0.03)


@pytest.mark.parametrize(
    "name, values, samples",
    [
        ("top1", [0.8], None),
        ("val_loss", [0.5], 100),
        ("f1", [0.5], 100),
        ("accuracy", [50.0], 100),
        ("accuracy", [0.5, 0.333], 100),
        ("accuracy", [1.0], 100),
        ("accuracy", [], 100),
    ],
)
def test_there_is_no_standard_error_of_what_may_be_no_share(name, values, samples):
    assert standard_error(name, values, samples) is None


class Regression(pl.LightningModule):
    """Logs a metric object, a collection of names that tell nothing, and batches of unclear length."""

    def __init__(self):
        super().__init__()
        self.net, self.fit, self.plain = nn.Linear(4, 2), MeanSquaredError(), MeanMetric()

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, index):
        self.fit(self(batch[0]), torch.zeros(len(batch[0]), 2))
        self.plain(1.0)
        self.log_dict({"fit": self.fit, "plain": self.plain}, on_epoch=True)


@pytest.mark.parametrize("clear", [True, False])
def test_a_run_takes_directions_from_metric_objects_and_counts_samples_where_that_is_clear(clear):
    inputs = torch.randn(20, 4)
    loader = DataLoader(TensorDataset(inputs, torch.zeros(20, 2)), batch_size=8)
    if not clear:
        loader = DataLoader([(inputs, torch.zeros(3))], batch_size=None)
    run = quantize(Regression(), [inputs], loader, "calibrate", trainer_options={"accelerator": "cpu"})
    metrics = run.record("test", "regression", "fit", None)["metrics"]
    assert metrics["fit"]["higher_is_better"] is False and metrics["plain"]["higher_is_better"] is None
    assert metrics["fit"]["validation_samples"] == (20 if clear else None)
    assert metrics["fit"]["quantized"] == run.metrics["fit"] != run.float_metrics["fit"]
    assert "log" not in vars(run.module)
