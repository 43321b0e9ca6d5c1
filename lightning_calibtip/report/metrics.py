"""What is known of the metrics that validation logs: which way is better, and how far chance may move them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Words in the names of metrics.
_LOWER = "loss losses error err perplexity ppl mse rmse mae mape wer cer nll kl divergence fid"
_HIGHER = (
    "acc accuracy top f1 auc auroc auprc ap map iou miou dice bleu rouge precision recall specificity sensitivity psnr "
    "ssim r2 exact em mcc kappa"
)

# Names of metrics that may be shares of samples that are right.
_SHARES = "acc accuracy top exact em error err"


@dataclass(frozen=True)
class Validation:
    """What is known of a validation besides the values that it logs.

    Args:
        higher_is_better: By the names of metrics, where the user's code says so.
        samples: Number of samples of each dataloader; empty if it is not known.

    Example:
        >>> Validation({"val_acc": True}, [10_000]).samples_of("val_acc")
        10000
    """

    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    samples: Sequence[int] = ()

    def samples_of(self, name: str) -> int | None:
        """Number of samples that a metric was computed on, if it is known."""
        loader = re.search(r"/dataloader_idx_(\d+)$", name)
        index = int(loader[1]) if loader else 0
        # A metric of several loaders together has no index.
        known = index < len(self.samples) and (loader is not None or len(self.samples) == 1)
        return self.samples[index] if known else None

    def is_better_higher(self, name: str) -> bool | None:
        """Whether more of a metric is better: what the user's code says, else what its name says; None if unknown."""
        plain = re.sub(r"/dataloader_idx_\d+$", "", name)
        for known in (name, plain, re.sub(r"_(epoch|step)$", "", plain)):
            if known in self.higher_is_better:
                return self.higher_is_better[known]
        return better_higher(plain)


def better_higher(name: str) -> bool | None:
    """Whether more of a metric is better, by the words in its name.

    Args:
        name: Name under which it was logged.

    Returns:
        None where the name does not tell.

    Example:
        >>> better_higher("val/top1"), better_higher("valLoss"), better_higher("score")
        (True, False, None)
    """
    words = _words(name)
    higher, lower = bool(words & {*_HIGHER.split()}), bool(words & {*_LOWER.split()})
    return None if higher == lower else higher


def standard_error(name: str, values: Iterable[float], samples: int | None) -> float | None:
    """Standard error of the first of a metric's values, ``sqrt(p (1 - p) / n)``, if it is a share of right samples.

    That it is one is taken for granted only where its name says so and every value is a whole number of samples over
    their number: averages over classes or tokens are hardly ever.

    Args:
        name: Name of the metric.
        values: Its values for several models on the same samples.
        samples: Number of samples, or None if it is not known.

    Returns:
        None where it is not known to be one.

    Example:
        >>> standard_error("accuracy", [0.5, 0.75], 100)
        0.05
        >>> standard_error("accuracy", [0.7512], 100) is None
        True
    """
    values = list(values)
    if not samples or not _words(name) & {*_SHARES.split()} or not values:
        return None
    tolerance = min(0.01 + 1e-6 * samples, 0.1)
    if any(not 0 <= p <= 1 or abs(p * samples - round(p * samples)) > tolerance for p in values):
        return None
    return _error_of_share(values[0], samples)


def metric_records(
    float_metrics: Mapping[str, float], stages: Sequence[Mapping[str, float]], validation: Validation
) -> dict[str, dict[str, float | bool | None]]:
    """What is known of each metric, for the record.

    Args:
        float_metrics: Metrics of the float model.
        stages: Metrics after each stage.
        validation: What is known of the validation.

    Returns:
        By the name of the metric: ``float``, ``quantized``, ``higher_is_better``, ``validation_samples``, and the
        ``standard_error`` of the quantized model's value; None for what is not known.

    Example:
        >>> metric_records({"acc": 0.75}, [{"acc": 0.5}], Validation(samples=[4]))["acc"]["standard_error"]
        0.25
    """
    records: dict[str, dict[str, float | bool | None]] = {}
    for name in dict.fromkeys(name for metrics in (float_metrics, *stages) for name in metrics):
        values = [metrics[name] for metrics in (*reversed(stages), float_metrics) if name in metrics]
        records[name] = {
            "float": float_metrics.get(name),
            "quantized": stages[-1].get(name) if stages else None,
            "higher_is_better": validation.is_better_higher(name),
            "validation_samples": validation.samples_of(name),
            "standard_error": standard_error(name, values, validation.samples_of(name)),
        }
    return records


def share_error(value: float | None, metric: Mapping[str, Any]) -> float | None:
    """Standard error of a value of a metric that is known to be a share, see ``standard_error``.

    Args:
        value: The value, of any model.
        metric: Record of the metric, from ``metric_records``.

    Example:
        >>> share_error(0.5, {"standard_error": 0.04, "validation_samples": 100})
        0.05
    """
    if value is None or metric["standard_error"] is None:
        return None
    return _error_of_share(value, metric["validation_samples"])


def _error_of_share(value: float, samples: int) -> float | None:
    """None where all samples are alike, which tells nothing."""
    return math.sqrt(value * (1 - value) / samples) or None


def verdict(difference: float | None, higher_is_better: bool | None) -> str:
    """``"better"``, ``"worse"``, or ``""`` where there is no difference or nobody knows.

    Args:
        difference: Quantized less float.
        higher_is_better: Whether more is better; None if it is not known.

    Example:
        >>> verdict(-0.1, True), verdict(-0.1, False), verdict(-0.1, None)
        ('worse', 'better', '')
    """
    if not difference or higher_is_better is None or math.isnan(difference):
        return ""
    return "better" if (difference > 0) == higher_is_better else "worse"


def _words(name: str) -> set[str]:
    """Words of a name in lower case; digits at their end go with and without (``top1``, ``f1``)."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    found = set(re.findall(r"[a-z0-9]+", spaced.lower()))
    return found | {word.rstrip("0123456789") for word in found}
