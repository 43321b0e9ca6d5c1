"""Equalization: let channels of different range share the one scale of a tensor fairly."""

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from ..calibration.options import StorageOptions
from ..module import QuantizationModule
from ..network.scheme import QuantizationScheme
from ..reconstruction.equalizable import EqualizationOptions, check_absorb
from ..reconstruction.equalize import equalize
from ..report.equalization import equalization_item
from .options import merge_fields, storage_options
from .outcome import stage_outcome
from .stage import Stage, StageResult


class Equalization(Stage):
    """Gives the channels of each input ratios by which they are divided before they are rounded, and the weights too.

    It comes after ``Calibration`` (and after ``BitAllocation``), before ``BatchNormTuning`` and ``AdaQuant``, which
    goes on learning the ratios; inputs that have none begin there with ratios of 1, unless the module was loaded from a
    checkpoint in between. Another ``Calibration`` ends it.

    Args:
        options: Which inputs, and how much; the defaults of ``EqualizationOptions`` if None.
        storage: Where captured activations are kept: ``StorageOptions``, or a mapping of its fields
            (``{"activation_budget": "2GB"}``).
        **changes: Fields of ``EqualizationOptions`` that differ: ``absorb``, ``exponents``, ...

    Raises:
        TypeError: If an option does not exist.
        ValueError: If a value is out of its range.

    Example:
        >>> Equalization(absorb="only").options.absorb
        'only'
    """

    compares_logits = True

    def __init__(
        self,
        options: EqualizationOptions | None = None,
        *,
        storage: StorageOptions | Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        changes = merge_fields(self.name, EqualizationOptions, options, changes)
        self.options = EqualizationOptions(**changes)
        self.storage = storage_options(self.name, storage)

    @override
    def check(self, scheme: QuantizationScheme) -> None:
        """See ``Stage``: dividing inputs where the target would lose integer operations is refused."""
        check_absorb(self.options, scheme)

    @override
    def run(self, module: QuantizationModule) -> StageResult:
        """Choose the ratios, tensor by tensor in the order of execution."""
        with self.storage.open() as store:
            result = equalize(module.network, module.calibration, self.options, store, self.progress)
        figures = {
            "inputs": float(len(result.inputs)),
            "equalized": float(sum(found.exponent > 0 for found in result.inputs)) if result.kept else 0.0,
            "divergence_before": result.divergence_before,
            "divergence_after": result.divergence_after,
        }
        if not result.inputs:
            return StageResult(figures, outcome="No input has channels that can be equalized.")
        subject = f"Channels of {figures['equalized'] if result.kept else len(result.inputs):.0f} inputs"
        return StageResult(figures, [equalization_item(result.inputs)], stage_outcome(subject, "equalized", result))
