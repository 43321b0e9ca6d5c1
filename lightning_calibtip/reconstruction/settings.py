"""Settings of AdaQuant, checked once, and the schedule of its optimiser."""

import math
from dataclasses import dataclass

MODES = ("parallel", "sequential")
SCHEDULES = ("cosine", "constant")
ROUNDINGS = ("straight_through", "learned")

_COUNTS = ("iterations", "batch_size", "input_range_interval")
_RATES = ("weight_rate", "bias_rate", "weight_range_rate", "input_range_rate", "zero_point_rate", "rounding_rate")


@dataclass(frozen=True)
class AdaQuantSettings:
    """How one unit is optimised.

    Args:
        iterations: Steps of Adam a unit, at least 1.
        batch_size: Samples a step, at least 1.
        rounding: ``"straight_through"`` moves the weights and rounds them to nearest; ``"learned"`` keeps them and
            learns which way each is rounded (AdaRound, Nagel et al. 2020).
        weight_rate: Learning rate of weights, where these move.
        bias_rate: Learning rate of biases.
        weight_range_rate: Learning rate of the weights' scales.
        input_range_rate: Learning rate of the inputs' scales.
        zero_point_rate: Learning rate of zero points, in integer steps. A zero point acts rounded, so every move of it
            is a jump; the default lets it move by about one in a run, where its gradient keeps the sign.
        rounding_rate: Learning rate of the variables of learned rounding, whose range is about 5.
        rounding_strength: Weight of the regulariser that makes learned rounding decide, where 1 weighs a unit's
            wholly undecided weights as much as its error before optimisation.
        input_range_interval: The inputs' scales and zero points learn only at every so many-th step, with as many times
            their rates: a gradient of the input costs as much as one of the weights.
        drop_probability: Share of the activations, 0 to 1, that are left unquantized at each step, drawn anew (QDrop,
            Wei et al. 2022); in sequential mode the same share of the unit's inputs is the float model's.
        relative: Whether rates are fractions of a quantization step, so that they fit any width and any layer: for a
            weight, of its scale; for a scale, of what moves the end of the range by one step; for a bias, of the root
            mean square of the output error. Otherwise they are absolute, as in the paper.
        schedule: ``"cosine"`` lets the rates fall to zero along half a cosine, ``"constant"`` keeps them.
        holdout: Share of the samples, above 0 and below 1, that is not optimised on and decides whether the result is
            kept.
        seed: Of everything drawn.

    Raises:
        ValueError: naming the setting, its value and the allowed range.
    """

    iterations: int = 500
    batch_size: int = 32
    rounding: str = "straight_through"
    weight_rate: float = 5e-3
    bias_rate: float = 2e-2
    weight_range_rate: float = 5e-2
    input_range_rate: float = 5e-2
    zero_point_rate: float = 4e-3
    rounding_rate: float = 2e-2
    rounding_strength: float = 1.0
    input_range_interval: int = 4
    drop_probability: float = 0.0
    relative: bool = True
    schedule: str = "cosine"
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        for name in (*_RATES, "rounding_strength"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        for name, allowed in (("rounding", ROUNDINGS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not 0 <= self.drop_probability <= 1:
            raise ValueError(f"drop_probability must be from 0 to 1, got {self.drop_probability}.")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be above 0 and below 1, got {self.holdout}.")

    def rate_at(self, step: int) -> float:
        """Factor of the learning rates at a step."""
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * step / self.iterations))


# The settings of the paper's published code: absolute rates, no decay.
PAPER = {
    "iterations": 1000,
    "batch_size": 50,
    "weight_rate": 1e-5,
    "bias_rate": 1e-3,
    "weight_range_rate": 1e-3,
    "input_range_rate": 1e-1,
    "zero_point_rate": 1e-1,
    "input_range_interval": 1,
    "relative": False,
    "schedule": "constant",
}
