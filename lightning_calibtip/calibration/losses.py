"""Loss of a model as it is, over the calibration set: how much quantization has cost."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import ranks
from ..batches import batch_size
from ..network.network import QuantizedNetwork
from .calibration_set import CalibrationSet
from .divergences import Divergence, check_divergence, divergence_of
from .fingerprint import describe_function

LossFunction = Callable[[Any, Any], Any]


def check_metric(metric: str | LossFunction | Divergence | Mapping[str, Any], option: str = "metric") -> None:
    """Raise ``ValueError`` unless ``metric`` is a divergence, the name of one, or a function.

    Args:
        metric: Divergence, name or function.
        option: Name of the option, for the message.

    Example:
        >>> check_metric("kl")
    """
    if not callable(metric):
        check_divergence(metric, option, f" or a function {option}(output, batch)")


class Loss:
    """Mean loss per sample of the model as it is at the time of the call.

    Args:
        network: Calibrated network, whose float model gives the targets of the unlabelled metrics.
        calibration: Calibration set.
        metric: ``"kl"``: KL divergence to the float logits, in nats (see ``sample_divergences``). ``"mse"``: mean
            squared difference from the float outputs, over their mean square. A ``Utility``, or another ``Divergence``
            or its name. Or a function ``metric(output, batch)`` whose mean over a batch counts, less being better: the
            user's labelled loss, or anything else.
        samples: Number of samples to measure on (the first whole batches that hold as many); all if None.

    Raises:
        ValueError: If ``metric`` is unknown, or does not fit the model's outputs.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 2)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.ones(1, 2))
        >>> network = QuantizedNetwork(model, QuantizationScheme())
        >>> network.prepare(lambda: calibration.run(0))
        >>> Loss(network, calibration, "mse")()
        0.0
    """

    def __init__(
        self,
        network: QuantizedNetwork,
        calibration: CalibrationSet,
        metric: str | LossFunction | Divergence | Mapping[str, Any] = "kl",
        samples: int | None = None,
    ) -> None:
        check_metric(metric)
        self.network = network
        self.metric: LossFunction | Divergence = metric if callable(metric) else divergence_of(metric)
        # Name of the metric; for a function, with a digest, so that lambdas differ.
        self.name = describe_function(metric) if callable(metric) else divergence_of(metric).name
        calibration.require()
        self.calibration = CalibrationSet(calibration.forward, calibration.token_mask)
        for batch in calibration.batches:
            if samples is None or self.calibration.samples < samples:
                self.calibration.batches.append(batch)
        self._targets = [] if callable(self.metric) else self.metric.targets(network, self.calibration)

    def predictor(self) -> "Loss":
        """The loss on the same samples by which choices are compared, see ``Divergence.predictor``; this one, but
        where the metric names another."""
        if callable(self.metric) or (other := self.metric.predictor()) is self.metric:
            return self
        return Loss(self.network, self.calibration, other)

    @torch.no_grad()
    def __call__(self, run: Callable[[int], Any] | None = None) -> float:
        """Measure.

        Args:
            run: ``run(index)`` gives the output for a batch; that of the calibration set if None, of which each of
                several ranks then runs its share of the batches.
        """
        batches = self.calibration.batches

        def total(index: int) -> float:
            output = (run or self.calibration.run)(index)
            return self._of_batch(output, index, batches[index]) * batch_size(batches[index])

        indices = list(range(len(batches)))
        totals = ranks.share(indices, total) if run is None else map(total, indices)
        return sum(totals) / self.calibration.samples

    def _of_batch(self, output: Any, index: int, batch: Any) -> float:
        if callable(self.metric):
            return float(torch.as_tensor(self.metric(output, batch)).float().mean())
        tokens = self.calibration.tokens(index)
        return float(self.metric.of_samples(output, self._targets[index], tokens).mean())
