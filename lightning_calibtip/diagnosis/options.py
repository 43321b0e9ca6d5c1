"""Options of a diagnosis."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..calibration.divergences import Divergence
from ..calibration.losses import LossFunction, check_metric
from ..calibration.utility import with_utility
from ..option_fields import require_count


@dataclass(frozen=True)
class DiagnosisOptions:
    """Options of a diagnosis.

    Args:
        loss: Loss whose rise is measured: ``"kl"`` to the float logits, ``"mse"`` of the outputs, what mistakes cost
            (a ``Utility``, or a mapping of its fields), or a function ``loss(output, batch)``, see ``Loss``.
        samples: Number of calibration samples to measure on; None for a quarter of them, at least 16 and at most 256.
        apply: Whether remedies are applied, the one of greatest measured gain first, until the user's own validation
            metric is within ``max_degradation`` of the float model's.
        max_degradation: Greatest difference from the float metric that is accepted, in the metric's own unit, at least
            0.
        metric: Name of the validation metric that decides; the first one logged if None.
        mode: ``"max"`` where a greater metric is better, ``"min"`` where a smaller one is. None: what the metric's name
            says (``val_acc``, ``val_loss``); where it says nothing, the side of the float model's metric on which the
            quantized model's lies before any remedy is the worse one.
        tries: Number of remedies whose gain is measured before the best of them is applied, at least 1.

    Raises:
        ValueError: If a value is out of its range, or ``metric`` or ``mode`` are given without ``apply``.

    Example:
        >>> DiagnosisOptions(apply=True, metric="val_acc").max_degradation
        0.01
    """

    # In this order jsonargparse takes the path of a function for the function.
    loss: LossFunction | Divergence | Mapping[str, Any] | str = "kl"
    samples: int | None = None
    apply: bool = False
    max_degradation: float = 0.01
    metric: str | None = None
    mode: Literal["max", "min"] | None = None
    tries: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", with_utility(self.loss, "loss"))
        check_metric(self.loss, "loss")
        require_count(self.tries, "tries")
        if self.samples is not None:
            require_count(self.samples, "samples")
        number = isinstance(self.max_degradation, int | float) and not isinstance(self.max_degradation, bool)
        if not number or not self.max_degradation >= 0:
            raise ValueError(f"max_degradation must be at least 0, got {self.max_degradation!r}.")
        if self.mode not in (None, "max", "min"):
            raise ValueError(f"mode must be 'max', 'min' or None, got {self.mode!r}.")
        if not self.apply and (self.metric is not None or self.mode is not None):
            raise ValueError("metric and mode decide when remedies are enough: they need apply=True.")

    def samples_of(self, available: int) -> int:
        """Number of samples to measure on, of so many.

        Example:
            >>> [DiagnosisOptions().samples_of(available) for available in (16, 100, 512, 4096)]
            [16, 25, 128, 256]
        """
        wanted = min(256, max(16, available // 4)) if self.samples is None else self.samples
        return min(wanted, available)
