"""AdaQuant: reconstruct each layer or block so that its quantized output matches the float one."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from .. import ranks
from ..calibration.activation_store import ActivationStore
from ..calibration.divergences import divergence_of
from ..calibration.options import StorageOptions
from ..files.state_folder import remove_state
from ..module import QuantizationModule
from ..network.protection import require_nodes
from ..quantization.spec import BitWidths, parse_bit_widths
from ..reconstruction.adaquant import adaquant
from ..reconstruction.candidates import adaquant_candidates, check_candidates
from ..reconstruction.objectives import check_layers
from ..reconstruction.optimize import UnitResult
from ..reconstruction.options import AdaQuantOptions
from ..reconstruction.resume import FILES
from ..report.reconstruction import reconstruction_item
from .options import merge_fields, storage_options
from .outcome import units_outcome
from .stage import Stage, StageResult


class AdaQuant(Stage):
    """Optimises weights, bias, scales and zero points of each unit against the mean squared error of its output.

    Args:
        options: What is reconstructed, and how; the defaults of ``AdaQuantOptions`` if None.
        candidates: Bit-widths at which every layer is reconstructed, for ``BitAllocation`` to choose from: numbers or
            pairs ``(weight_bits, activation_bits)``, in which None leaves one of them in float. They need
            ``mode="parallel"`` and ``granularity="layer"``. None for the module's own bit-widths alone.
        storage: Where captured activations are kept: ``StorageOptions``, or a mapping of its fields
            (``{"activation_budget": "2GB", "precision": "bfloat16"}``).
        state_folder: Folder of its own for the finished units: a run that was killed and is repeated is resumed from
            there, to bit-identical weights. ``quantize`` and the ``CalibTIP`` callback remove it at the end; with
            stages of your own, call ``clean_up()`` when the result is saved. None to keep nothing.
        **changes: Fields of ``AdaQuantOptions`` that differ: ``mode``, ``granularity``, ``iterations``, ...

    Raises:
        TypeError: If an option does not exist.
        ValueError: If a value is out of its range.

    Example:
        >>> stage = AdaQuant(iterations=100, storage={"activation_budget": "2GB"})
        >>> stage.options.iterations, stage.options.mode
        (100, 'sequential')
        >>> AdaQuant(stage.options, mode="parallel", granularity="layer", candidates=[4, (8, None)]).options.iterations
        100
    """

    def __init__(
        self,
        options: AdaQuantOptions | None = None,
        *,
        candidates: Sequence[int | Sequence[int | None]] | None = None,
        storage: StorageOptions | Mapping[str, Any] | None = None,
        state_folder: str | Path | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        changes = merge_fields(self.name, AdaQuantOptions, options, changes)
        self.options = AdaQuantOptions(**changes)
        loss = self.options.loss
        if loss is not None and not callable(loss):
            self.compares_logits, self.divergence = True, divergence_of(loss)
        self.candidates = None if candidates is None else list(candidates)
        if self.candidates is not None:
            # What a number stands for depends on the module; whether it is one does not.
            check_candidates(self.options, [parse_bit_widths(value, "candidates") for value in self.candidates])
        self.storage = storage_options(self.name, storage)
        self.state_folder = None if state_folder is None else Path(state_folder)

    @classmethod
    def paper(cls, **changes: Any) -> "AdaQuant":
        """With the options of the paper's published code: layers, absolute rates, no decay, batches of 50.

        Args:
            **changes: Arguments of ``AdaQuant`` that differ from these.

        Example:
            >>> AdaQuant.paper(iterations=7).options.batch_size
            50
        """
        return cls(AdaQuantOptions.paper(), **changes)

    @override
    def clean_up(self) -> None:
        """Remove the finished units from the state folder, and the folder if nothing else is in it."""
        remove_state(self.state_folder, FILES)

    @override
    def check_plan(self, module: QuantizationModule) -> None:
        """Refuse to protect nodes where there are none, and an objective that does not fit the model."""
        super().check_plan(module)
        layers = list(module.network.layers.values())
        require_nodes(layers, self.options.protection, self.name)
        check_layers(self.options.objective, layers)

    @override
    def run(self, module: QuantizationModule) -> StageResult:
        """Reconstruct the model unit by unit."""
        with self.storage.open() as store:
            by_candidate = self._reconstruct(module, store)
        results = [result for _, of_candidate in by_candidate for result in of_candidate]
        # Of units that are dealt out, each process has spent its share.
        is_dealt_out = self.options.mode == "parallel"
        # A unit that could not be optimised has no errors.
        errors = [(r.error_before, r.error_after) for r in results if math.isfinite(r.error_before)] or [(0.0, 0.0)]
        figures = {
            "error_before": sum(before for before, _ in errors) / len(errors),
            "error_after": sum(after for _, after in errors) / len(errors),
            "units": float(len(results)),
            "restored": float(sum(not result.kept for result in results)),
            "step_seconds": sum(result.seconds for result in results) / (ranks.rank_count() if is_dealt_out else 1),
            "captured_bytes": float(store.most_held),
        }
        items = [reconstruction_item(of, candidate) for candidate, of in by_candidate]
        return StageResult(figures, items, units_outcome(results, self.candidates is not None))

    def _reconstruct(
        self, module: QuantizationModule, store: ActivationStore
    ) -> Sequence[tuple[BitWidths | None, list[UnitResult]]]:
        """Candidates, each with the results of the units; None in place of a candidate if there are none."""
        network, calibration, options = module.network, module.calibration, self.options
        if self.candidates is None:
            return [(None, adaquant(network, calibration, options, store, self.state_folder, self.progress))]
        candidates = [network.scheme.bit_widths(value, "candidates") for value in self.candidates]
        results = adaquant_candidates(
            network, calibration, options, candidates, store, self.state_folder, self.progress
        )
        return list(results.items())
