"""Loss of a model as it is, over the calibration set: how much quantization has cost."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..batches import batch_size
from ..network.network import QuantizedNetwork
from .calibration_set import CalibrationSet
from .fingerprint import describe_function
from .logits import POSITION_LOGITS, float_logits, paired_logits, sample_divergences

LossFunction = Callable[[Any, Any], Any]
METRICS = ("kl", "mse")


def check_metric(metric: str | LossFunction) -> None:
    """Raise ``ValueError`` unless ``metric`` is one of ``METRICS`` or a function.

    Args:
        metric: Name or function.

    Example:
        >>> check_metric("kl")
    """
    if not callable(metric) and metric not in METRICS:
        raise ValueError(f"metric must be {', '.join(METRICS)} or a function metric(output, batch), got {metric!r}.")


class Loss:
    """Mean loss per sample of the model as it is at the time of the call.

    Args:
        network: Calibrated network, whose float model gives the targets of the unlabelled metrics.
        calibration: Calibration set.
        metric: ``"kl"``: KL divergence to the float logits, in nats (see ``sample_divergences``). ``"mse"``: mean
            squared difference from the float outputs, over their mean square. Or a function ``metric(output, batch)``
            whose mean over a batch counts, less being better: the user's labelled loss, or anything else.
        samples: Number of samples to measure on (the first whole batches that hold as many); all if None.

    Raises:
        ValueError: If ``metric`` is unknown.

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
        metric: str | LossFunction = "kl",
        samples: int | None = None,
    ) -> None:
        check_metric(metric)
        self._described = metric if isinstance(metric, str) else describe_function(metric)
        calibration.require()
        self.metric, self.calibration = metric, CalibrationSet(calibration.forward, calibration.token_mask)
        for batch in calibration.batches:
            if samples is None or self.calibration.samples < samples:
                self.calibration.batches.append(batch)
        self._targets = [] if callable(metric) else float_logits(network, self.calibration)

    @property
    def name(self) -> str:
        """Name of the metric; for a function, with a digest, so that lambdas differ."""
        return self.metric if isinstance(self.metric, str) else self._described

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
        if self.metric == "kl":
            return float(sample_divergences(output, self._targets[index], tokens).mean())
        return math.fsum(
            _relative_squared_error(*parts) for parts in paired_logits(output, self._targets[index], tokens)
        )


def _relative_squared_error(name: str, output: Tensor, target: Tensor, tokens: Tensor | None) -> float:
    output, target = output.float(), target.float()
    by_token = target.dim() > 2 or name.startswith(POSITION_LOGITS) or (tokens is not None and tokens.dim() == 1)
    if tokens is not None and by_token and target.shape[: tokens.dim()] == tokens.shape:
        output, target = output[tokens], target[tokens]
    return float((output - target).square().mean() / target.square().mean().clamp_min(1e-20))
