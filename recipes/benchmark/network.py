"""Networks for measurements: calibrated without a Trainer, loaded with their data, validated."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_calibtip.calibration.calibration_set import CalibrationSet
from lightning_calibtip.network.network import QuantizedNetwork
from lightning_calibtip.network.scheme import QuantizationScheme
from lightning_calibtip.quantization.ranges import RangeOptions

from ..bert_squad.data import SquadData
from ..bert_squad.model import QuestionAnswering
from ..bert_squad.windows import WindowMaker, load_tokenizer, takes_token_types


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Sequence[Tensor], scheme: QuantizationScheme, observer: str = "mse"
) -> tuple[QuantizedNetwork, CalibrationSet]:
    """Quantize a model in place, with ranges from the batches."""
    model.eval().requires_grad_(False)
    calibration = CalibrationSet(lambda batch, index: model(batch))
    for batch in batches:
        calibration.append(batch)
    network = QuantizedNetwork(model, scheme)
    network.prepare(lambda: calibration.run(0))
    network.attach_observers(RangeOptions(observer=observer, weight_observer=observer))
    with network.observing():
        for index in range(len(calibration)):
            calibration.run(index)
    network.fit_ranges()
    return network, calibration


def validate(module: pl.LightningModule, data: pl.LightningDataModule, metric: str, accelerator: str = "cpu") -> float:
    """What the module's own validation logs of a metric."""
    trainer = pl.Trainer(
        accelerator=accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return float(trainer.validate(module, data.val_dataloader(), verbose=False)[0][metric])


def load_bert(model: str, train: str, validation: str, batch_size: int = 16) -> tuple[QuestionAnswering, SquadData]:
    """A question answering network, and questions in windows of 256 tokens, 64 of them to calibrate on."""
    tokenizer, trained = load_tokenizer(model), QuestionAnswering(model)
    maker = WindowMaker(tokenizer, 256, 96, takes_token_types(tokenizer, trained.net))
    questions = SquadData(maker, train, validation, 64, batch_size=batch_size)
    questions.setup()
    trained.evaluation = questions.evaluation
    return trained, questions
