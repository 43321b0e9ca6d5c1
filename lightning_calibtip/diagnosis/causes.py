"""Causes of a layer's loss, in the words of the field, from what rounding does to its tensors."""

import math
from dataclasses import dataclass

from .layer_statistics import LayerStatistics
from .statistics import TensorStatistics

# A channel, or a token, of so many times the median's magnitude leaves the others few levels.
OUTLIER = 8.0
# A share of the squared error, or of a range, from which on it is the cause.
_HALF = 0.5
# Of the levels that there are, so many are used where values are spread as a bell curve is; fewer is few.
_FEW = 0.25

OUTLIER_CHANNEL = "outlier channel"
OUTLIER_TOKEN = "outlier token"
CLIPPED_TAIL = "clipped tail"
DEAD_RANGE = "dead range"
FEW_LEVELS = "few levels used"
BIASED_MEAN = "biased mean"
COARSE_STEPS = "coarse steps"


@dataclass(frozen=True)
class Cause:
    """Why rounding a tensor costs what it costs.

    Args:
        name: One of the names above.
        part: ``"weight"``, ``"inputs"`` or ``"output"``.
        detail: What was measured, for people.

    Example:
        >>> str(Cause(OUTLIER_CHANNEL, "inputs", "channel 3 reaches 20 times the median"))
        'inputs: outlier channel (channel 3 reaches 20 times the median)'
    """

    name: str
    part: str
    detail: str

    def __str__(self) -> str:
        return f"{self.part}: {self.name} ({self.detail})"


def find_cause(statistics: LayerStatistics, of_weight: bool, has_bias: bool) -> Cause:
    """Name the cause of a layer's loss.

    Args:
        statistics: Statistics of the layer.
        of_weight: Whether its weight costs more than its inputs.
        has_bias: Whether the layer has a bias that could take up a shift of the mean.

    Example:
        >>> of_input = TensorStatistics(0.1, clipped=0.0, used=1.0, levels=9.0, available=16, channel=(20.0, 3))
        >>> str(find_cause(LayerStatistics(None, (of_input,), 0.1, 0.0), of_weight=False, has_bias=True))
        'inputs: outlier channel (channel 3 reaches 20 times the median)'
    """
    if has_bias and statistics.output_bias >= _HALF:
        share = f"{statistics.output_bias:.0%} of the output's squared error is a shift of the channels' means"
        return Cause(BIASED_MEAN, "output", share)
    inputs = [of_input for of_input in statistics.inputs if of_input is not None]
    if of_weight and statistics.weight is not None:
        return _cause_of(statistics.weight, "weight")
    worst = max(inputs, key=lambda of_input: of_input.error, default=None)
    if worst is not None:
        return _cause_of(worst, "inputs")
    if statistics.weight is not None:
        return _cause_of(statistics.weight, "weight")
    return Cause(COARSE_STEPS, "output", "its output alone is quantized, or no sample has reached it")


def _cause_of(tensor: TensorStatistics, part: str) -> Cause:
    if tensor.channel is not None and tensor.channel[0] >= OUTLIER:
        factor, channel = tensor.channel
        return Cause(OUTLIER_CHANNEL, part, f"channel {channel} reaches {factor:.3g} times the median")
    if tensor.token is not None and tensor.token >= OUTLIER:
        return Cause(OUTLIER_TOKEN, part, f"a token reaches {tensor.token:.3g} times the median")
    if tensor.used <= _HALF:
        return Cause(DEAD_RANGE, part, f"values extend over {tensor.used:.0%} of the range")
    if tensor.clipped >= _HALF:
        return Cause(CLIPPED_TAIL, part, f"{tensor.clipped:.0%} of the squared error is outside the range")
    if tensor.levels <= _FEW * tensor.available:
        return Cause(FEW_LEVELS, part, f"{tensor.levels:.3g} of {tensor.available} levels are in effective use")
    of = "" if math.isnan(tensor.levels) else f" of {tensor.available} levels"
    return Cause(COARSE_STEPS, part, f"steps{of} leave an error of {tensor.error:.2g} of the mean square")
