"""Calibration: choose the ranges of activations and weights from what one epoch shows."""

import lightning.pytorch as pl
import torch
from typing_extensions import override

from ..module import QuantizationModule
from ..quantization.observers import make_observer
from ..quantization.ranges import check_range_method
from .stage import Stage


class Calibration(Stage):
    """Observes the layers' inputs during the calibration epoch, sets all ranges at its end and switches quantization
    on.

    BatchNorms are folded into the layers before them on the first batch. Only calibration batches move an observer.

    Args:
        observer: How activation ranges are chosen: ``"minmax"``, ``"moving_average"`` (of each batch's minimum and
            maximum, the paper's), ``"percentile"``, ``"mse"`` (least mean squared error) or ``"lp"`` (least L_p error,
            as LAPQ starts).
        weight_observer: The same for weights.
        momentum: For ``"moving_average"``: weight of the newest batch, above 0 and at most 1.
        percentile: For ``"percentile"``: share of values, in per cent, inside the range on each side, above 50 and at
            most 100.
        p: For ``"lp"``: exponent of the error, above 0.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        observer: str = "mse",
        weight_observer: str = "mse",
        momentum: float = 0.1,
        percentile: float = 99.99,
        p: float = 2.4,
    ) -> None:
        super().__init__()
        for method in (
            check_range_method(observer, "observer"),
            check_range_method(weight_observer, "weight_observer"),
        ):
            make_observer(method, momentum, percentile, p)
        self.observer, self.weight_observer = observer, weight_observer
        self.momentum, self.percentile, self.p = momentum, percentile, p

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Called after each calibration batch: let the observers see it."""
        assert isinstance(pl_module, QuantizationModule)
        if batch_idx == 0:
            pl_module.network.watch(self.observer, self.weight_observer, self.momentum, self.percentile, self.p)
        tokens = pl_module.calibration.tokens(batch_idx)
        with pl_module.network.observing(tokens), torch.no_grad(), trainer.precision_plugin.forward_context():
            pl_module.calibration.run(batch_idx)

    @override
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Choose the ranges."""
        module.network.fit_ranges()
        return {"layers": float(len(module.network.layers)), "samples": float(module.calibration.samples)}
