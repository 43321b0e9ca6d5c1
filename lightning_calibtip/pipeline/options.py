"""PipelineOptions: the options of every stage, each declared once in its stage's own dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..allocation.options import AllocationOptions
from ..calibration.options import StorageOptions
from ..calibration.utility import Utility, with_utility
from ..option_fields import with_changes
from ..quantization.ranges import RangeOptions
from ..reconstruction.equalizable import EqualizationOptions
from ..reconstruction.options import AdaQuantOptions
from ..tuning.batch_norm import BatchNormTuningOptions
from ..tuning.bias import BiasTuningOptions


@dataclass(frozen=True)
class PipelineOptions:
    """Options of all stages of a pipeline; a pipeline uses those of the stages that it has.

    A stage's options are an instance of their dataclass, or a mapping of the fields that differ from the default
    (``{"adaquant": {"iterations": 200}}``).

    Args:
        calibration: How ranges are chosen.
        equalization: Options of the equalization of inputs.
        batch_norm_tuning: Options of BatchNorm tuning.
        adaquant: Options of AdaQuant. In ``"advanced"`` its mode is parallel and its units are layers, whatever is
            given here.
        preparation: Options of the AdaQuant that prepares the candidates of ``"mixed"``, parallel and by layers; 100
            iterations by default, since the states at the candidate bit-widths serve the choice alone.
        allocation: Options of bit allocation: budgets, candidates, solver.
        bias_tuning: Options of bias tuning.
        storage: Where captured activations are kept, in every stage that captures some.
        state_folder: Folder of its own for finished units and measurements: a run that was killed and is repeated is
            resumed from there. ``QuantizationRun.save`` removes them once the checkpoint is written. None to keep
            nothing.
        utility: What mistakes cost, a ``Utility`` or a mapping of its fields: metric of bit allocation, loss that
            weights AdaQuant and divergence of bias tuning where these are left at their defaults, and rows of the
            report (``DecisionCosts``). None where all mistakes are alike.
        seed: Random seed of every stage; None leaves each stage the seed of its own options.

    Raises:
        TypeError: If an option does not exist, or a stage's options are neither their dataclass nor a mapping.
        ValueError: If a value is out of its range; the message names the place.

    Example:
        >>> options = PipelineOptions.of({"adaquant": {"iterations": 200}, "allocation": {"compression": 0.13}})
        >>> options.adaquant.iterations, options.preparation.iterations
        (200, 100)
        >>> PipelineOptions.of({"adaquant": {"iteration": 200}})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: options.adaquant: unknown option 'iteration'; did you mean 'iterations'? The options are: ...
    """

    calibration: RangeOptions = field(default_factory=RangeOptions)
    equalization: EqualizationOptions = field(default_factory=EqualizationOptions)
    batch_norm_tuning: BatchNormTuningOptions = field(default_factory=BatchNormTuningOptions)
    adaquant: AdaQuantOptions = field(default_factory=AdaQuantOptions)
    preparation: AdaQuantOptions = field(default_factory=partial(AdaQuantOptions, iterations=100))
    allocation: AllocationOptions = field(default_factory=AllocationOptions)
    bias_tuning: BiasTuningOptions = field(default_factory=BiasTuningOptions)
    storage: StorageOptions = field(default_factory=StorageOptions)
    state_folder: Path | None = None
    utility: Mapping[str, Any] | Utility | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for declared in fields(self):
            if callable(declared.default_factory):
                options = _stage_options(getattr(self, declared.name), declared.default_factory(), declared.name)
                object.__setattr__(self, declared.name, options)
        object.__setattr__(self, "utility", with_utility(self.utility, "options.utility"))
        if self.utility is not None and not isinstance(self.utility, Utility):
            raise TypeError(f"options.utility must be a Utility or a mapping of its fields, got {self.utility!r}.")
        if self.state_folder is not None:
            object.__setattr__(self, "state_folder", Path(self.state_folder))
        is_count = isinstance(self.seed, int) and not isinstance(self.seed, bool) and self.seed >= 0
        if self.seed is not None and not is_count:
            raise ValueError(f"options.seed must be an integer of at least 0 or None, got {self.seed!r}.")

    @classmethod
    def of(cls, options: "PipelineOptions | Mapping[str, Any] | None") -> "PipelineOptions":
        """Return options as they are, made from a nested mapping, or the defaults for None.

        Raises:
            TypeError: If an option does not exist.
            ValueError: If a value is out of its range.

        Example:
            See ``PipelineOptions``.
        """
        if isinstance(options, cls):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"options must be PipelineOptions or a mapping of its fields, got {options!r}.")
        return with_changes(cls(), options or {}, "options")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, for hyperparameters and the report.

        Example:
            >>> PipelineOptions(seed=3).to_dict()["seed"]
            3
        """
        plain: dict[str, Any] = plain_values(self)
        return plain


def _stage_options(value: Any, default: Any, name: str) -> Any:
    """A stage's options from what the user gave for them."""
    if isinstance(value, type(default)):
        return value
    place = f"options.{name}"
    if not isinstance(value, Mapping):
        raise TypeError(f"{place} must be {type(default).__name__} or a mapping of its fields, got {value!r}.")
    try:
        return with_changes(default, value, place)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def plain_values(value: Any) -> Any:
    """A value as JSON and YAML know it: dataclasses as mappings, functions by their names.

    Args:
        value: Any value.

    Example:
        >>> plain_values({"storage": StorageOptions(), "metric": len})["metric"]
        'len'
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {declared.name: plain_values(getattr(value, declared.name)) for declared in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", str(value))
