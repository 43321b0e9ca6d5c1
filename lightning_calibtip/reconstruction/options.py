"""Options of AdaQuant, checked at construction, and the schedule of its optimiser."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..calibration.divergences import Divergence, check_divergence, divergence_of
from ..calibration.fingerprint import describe_function
from ..calibration.utility import with_utility
from ..option_fields import require_count
from ..quantization.protection import Protection

# Each registers itself.
from . import degree_weighting, learned_rounding  # noqa: F401
from .feedback import FEEDBACK
from .importance import ReconstructionLoss
from .objectives import FISHER, SQUARED_ERROR, check_objective
from .rounding import STRAIGHT_THROUGH, check_rounding
from .units import GRANULARITIES

MODES = ("parallel", "sequential")
SCHEDULES = ("cosine", "constant")
STARTS = ("nearest", FEEDBACK)

_COUNTS = ("iterations", "batch_size", "input_range_interval")
_RATES = (
    "weight_rate",
    "bias_rate",
    "weight_range_rate",
    "input_range_rate",
    "zero_point_rate",
    "ratio_rate",
    "rounding_rate",
)

# Rates of what has to travel are those of a run of so many steps.
_REFERENCE_STEPS = 500

# The paper's published code: single layers, absolute rates, no decay.
_PAPER = {
    "granularity": "layer",
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


@dataclass(frozen=True)
class AdaQuantOptions:
    """What AdaQuant reconstructs, against which error, and how its optimiser works.

    Args:
        mode: ``"sequential"``: a unit's inputs come from the already quantized units before it and its target from the
            float model, so that each unit also makes up for the errors of those before. ``"parallel"``: its inputs come
            from the float model.
        granularity: ``"block"``: a unit is a block of layers around which paths fork and join, found by running the
            model; layers outside of these are units of their own. ``"layer"``: every layer is a unit.
        blocks: Names or patterns (``"layer1"``, ``"encoder.layer.*"``) of modules that are to be units; single layers
            and found blocks outside of these stay units of their own.
        objective: Name of a registered objective: ``"squared_error"``, ``"fisher"``, ``"degree"`` (nodes of a graph by
            their in-degree), or one of your own (see ``register_objective``).
        loss: ``loss(output, batch)`` gives a scalar from the model's output for a calibration batch. Each element of a
            unit's output is then weighted by the square of the loss's gradient (Fisher weighting, BRECQ), and the
            squared error becomes the ``"fisher"`` objective. ``"kl"``, a ``Utility`` (or a mapping of its
            fields) or another ``Divergence`` needs no labels: classes are drawn from the float model's own
            probabilities. None weights all elements alike.
        rounding: Name of a registered rounding method: ``"straight_through"`` moves the weights and rounds them to
            nearest; ``"learned"`` keeps them and learns which way each is rounded (AdaRound, Nagel et al. 2020); or one
            of your own (see ``register_rounding``).
        start: How weights are rounded before the first step: ``"nearest"``, or ``"feedback"``: one input dimension
            after the other, making up for the error of each in the next ones (GPTQ, Frantar et al. 2023).
        iterations: Number of Adam steps for each unit, at least 1. See ``relative``.
        batch_size: Number of samples in each step, at least 1.
        weight_rate: Learning rate of weights, where these move.
        bias_rate: Learning rate of biases.
        weight_range_rate: Learning rate of the weights' scales.
        input_range_rate: Learning rate of the activations' scales.
        zero_point_rate: Learning rate of zero points, in integer steps. A zero point acts rounded, so every move of it
            is a jump; the default lets it move by about one in a run, where its gradient keeps the sign.
        ratio_rate: Learning rate of the ratios of equalized channels.
        rounding_rate: Learning rate of the variables of learned rounding, whose range is about 5.
        rounding_strength: Weight of the regulariser that makes learned rounding decide, where 1 weights a unit whose
            rounding is entirely soft as much as the unit's error before optimisation.
        input_range_interval: The activations' scales and zero points are updated only at every N-th step, with N times
            their rates, because a gradient of the input costs as much as one of the weights.
        drop_probability: Share of the activations, 0 to 1, that are left unquantized at each step, drawn anew (QDrop,
            Wei et al. 2022); in sequential mode the same share of the unit's inputs is the float model's.
        protection_low: Probability that a node of the lowest in-degree of its graph is protected: what it sends, and
            what is aggregated for it, is left unquantized.
        protection_high: The same of a node of the highest in-degree, at least ``protection_low`` and at most 1; between
            them it grows with the rank (Degree-Quant: Tailor et al. 2021, who take 0.1 or 0.2). 0 protects none.
        relative: Whether rates are fractions of a quantization step, so that they fit any bit-width and any layer: for
            a weight, of its scale; for a scale, of the change that moves the end of the range by one step; for a bias,
            of the root mean square of the output error. Those of weights, biases, zero points and rounding are for 500
            steps; a run of another length has them larger or smaller by the root of the ratio, so that a random walk
            covers the same distance. Otherwise all rates are absolute, as in the paper.
        schedule: ``"cosine"`` lets the rates fall to zero along half a cosine, ``"constant"`` keeps them.
        holdout: Share of the samples, above 0 and below 1, that is not optimised on and decides whether the result is
            kept.
        seed: Random seed.

    Raises:
        ValueError: If an option is out of its range; the message gives its name, its value and the allowed range.

    Example:
        >>> AdaQuantOptions(iterations=10).rate_at(5)
        0.5
    """

    mode: str = "sequential"
    granularity: str = "block"
    blocks: Sequence[str] = ()
    objective: str = SQUARED_ERROR
    loss: ReconstructionLoss | Divergence | Mapping[str, Any] | str | None = None
    rounding: str = STRAIGHT_THROUGH
    start: str = "nearest"
    iterations: int = 500
    batch_size: int = 32
    weight_rate: float = 5e-3
    bias_rate: float = 2e-2
    weight_range_rate: float = 5e-2
    input_range_rate: float = 5e-2
    zero_point_rate: float = 4e-3
    ratio_rate: float = 2e-2
    rounding_rate: float = 2e-2
    rounding_strength: float = 1.0
    input_range_interval: int = 4
    drop_probability: float = 0.0
    protection_low: float = 0.0
    protection_high: float = 0.0
    relative: bool = True
    schedule: str = "cosine"
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mode", MODES),
            ("granularity", GRANULARITIES),
            ("start", STARTS),
            ("schedule", SCHEDULES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        check_rounding(self.rounding)
        if isinstance(self.blocks, str):
            raise ValueError(f"blocks must be a list of names or patterns, got {self.blocks!r}.")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "loss", with_utility(self.loss, "loss"))
        if self.loss is not None and not callable(self.loss):
            check_divergence(self.loss, "loss", " or a function loss(output, batch)")
        check_objective(self.objective, has_loss=self.loss is not None)
        for name in _COUNTS:
            value = getattr(self, name)
            require_count(value, name)
        for name in (*_RATES, "rounding_strength"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        if not 0 <= self.drop_probability <= 1:
            raise ValueError(f"drop_probability must be from 0 to 1, got {self.drop_probability}.")
        _ = self.protection
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be above 0 and below 1, got {self.holdout}.")

    @classmethod
    def paper(cls, **changes: Any) -> "AdaQuantOptions":
        """The options of the paper's published code: single layers, absolute rates, no decay, batches of 50.

        Args:
            changes: Options that differ from these.

        Example:
            >>> AdaQuantOptions.paper(seed=3).batch_size
            50
        """
        return cls(**{**_PAPER, **changes})

    @property
    def protection(self) -> Protection:
        """Probabilities of nodes of graphs to be protected."""
        return Protection(self.protection_low, self.protection_high)

    @property
    def objective_in_use(self) -> str:
        """Name of the objective; with a ``loss``, the squared error becomes the Fisher-weighted one."""
        return FISHER if self.loss is not None and self.objective == SQUARED_ERROR else self.objective

    def rate_at(self, step: int) -> float:
        """Factor of the learning rates at a step."""
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * step / self.iterations))

    @property
    def rate_scale(self) -> float:
        """Factor of the rates of weights, biases, zero points and rounding: with fewer steps each is larger.

        Example:
            >>> AdaQuantOptions(iterations=125).rate_scale, AdaQuantOptions.paper(iterations=125).rate_scale
            (2.0, 1.0)
        """
        return math.sqrt(_REFERENCE_STEPS / self.iterations) if self.relative else 1.0

    def describe(self) -> dict[str, Any]:
        """Plain values that identify the options, the loss by its name and a digest."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.loss is not None:
            values["loss"] = describe_function(self.loss) if callable(self.loss) else divergence_of(self.loss).name
        return values
