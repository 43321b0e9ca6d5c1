"""AdaQuant: reconstruct each layer or block so that its quantized output matches the float one."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from ..calibration.activation_store import ActivationStore, parse_bytes, parse_precision
from ..module import QuantizationModule
from ..quantization.scheme import check_pair
from ..reconstruction.adaquant import Reconstruction, adaquant
from ..reconstruction.candidates import adaquant_candidates, check_candidates
from ..reconstruction.importance import Loss
from ..reconstruction.settings import PAPER, AdaQuantSettings
from ..report.reconstruction import reconstruction_exhibit
from .stage import Stage


class AdaQuant(Stage):
    """Optimises weights, bias, scales and zero points of each unit against the mean squared error of its output.

    Args:
        mode: ``"sequential"``: each unit sees the quantized outputs of those before it; ``"parallel"``: float ones.
        granularity: A unit is a ``"block"`` of layers around which paths fork and join (found by running; layers
            outside of these are units of their own), or always a ``"layer"``.
        blocks: Names or patterns (``"layer1"``, ``"encoder.layer.*"``) of modules that are to be units; single layers
            and found blocks outside of these stay units of their own.
        rounding: ``"straight_through"`` or ``"learned"`` (AdaRound), see ``AdaQuantSettings``.
        drop_probability: Share of the activations that are left unquantized at each step (QDrop), 0 to 1.
        iterations: Steps of Adam a unit.
        batch_size: Samples a step.
        weight_rate: Learning rate of weights.
        bias_rate: Learning rate of biases.
        weight_range_rate: Learning rate of the weights' scales.
        input_range_rate: Learning rate of the inputs' scales.
        zero_point_rate: Learning rate of zero points, in integer steps.
        rounding_rate: Learning rate of learned rounding's variables.
        rounding_strength: Weight of its regulariser.
        input_range_interval: The inputs' scales learn at every so many-th step.
        relative: Whether rates are fractions of a quantization step (see ``AdaQuantSettings``), or absolute.
        schedule: ``"cosine"`` or ``"constant"``.
        holdout: Share of the calibration samples that decides whether a unit's result is kept.
        loss: ``loss(output, batch)``, a scalar from the model's output for a calibration batch: output elements then
            count by the square of its gradient (Fisher weighting, BRECQ). None to count all alike.
        candidates: Widths, or pairs ``(weight_bits, activation_bits)``, to reconstruct every layer at, for
            ``BitAllocation`` to choose from; needs ``mode="parallel"`` and ``granularity="layer"``. None for the
            module's own widths only.
        activation_budget: Bytes of captured activations that may lie in memory (a number, or ``"2GB"``); what exceeds
            it goes to files. None for no limit.
        storage: ``"float32"``, or ``"bfloat16"`` to keep captured activations in half of the space.
        scratch_folder: Where these files lie while AdaQuant runs; the system's temporary folder if None.
        state_folder: Folder of its own for the finished units: a run that was killed and is repeated goes on from
            there, to bit-identical weights. ``quantize`` and the ``CalibTIP`` callback remove it at the end; with
            stages of your own, call ``clean_up()`` when the result is saved. None to keep nothing.
        seed: Of everything drawn.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        mode: str = "sequential",
        granularity: str = "block",
        blocks: Sequence[str] = (),
        rounding: str = AdaQuantSettings.rounding,
        drop_probability: float = AdaQuantSettings.drop_probability,
        iterations: int = AdaQuantSettings.iterations,
        batch_size: int = AdaQuantSettings.batch_size,
        weight_rate: float = AdaQuantSettings.weight_rate,
        bias_rate: float = AdaQuantSettings.bias_rate,
        weight_range_rate: float = AdaQuantSettings.weight_range_rate,
        input_range_rate: float = AdaQuantSettings.input_range_rate,
        zero_point_rate: float = AdaQuantSettings.zero_point_rate,
        rounding_rate: float = AdaQuantSettings.rounding_rate,
        rounding_strength: float = AdaQuantSettings.rounding_strength,
        input_range_interval: int = AdaQuantSettings.input_range_interval,
        relative: bool = True,
        schedule: str = "cosine",
        holdout: float = AdaQuantSettings.holdout,
        loss: Loss | None = None,
        candidates: Sequence[int | Sequence[int]] | None = None,
        activation_budget: int | str | None = None,
        storage: str = "float32",
        scratch_folder: str | Path | None = None,
        state_folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        settings = AdaQuantSettings(
            iterations=iterations,
            batch_size=batch_size,
            rounding=rounding,
            weight_rate=weight_rate,
            bias_rate=bias_rate,
            weight_range_rate=weight_range_rate,
            input_range_rate=input_range_rate,
            zero_point_rate=zero_point_rate,
            rounding_rate=rounding_rate,
            rounding_strength=rounding_strength,
            input_range_interval=input_range_interval,
            drop_probability=drop_probability,
            relative=relative,
            schedule=schedule,
            holdout=holdout,
            seed=seed,
        )
        progress = None if state_folder is None else Path(state_folder)
        self.reconstruction = Reconstruction(settings, mode, granularity, blocks, loss, progress)
        self.candidates = None if candidates is None else [check_pair(pair, "candidates") for pair in candidates]
        if self.candidates is not None:
            check_candidates(self.reconstruction, self.candidates)
        self.activation_budget = parse_bytes(activation_budget, "activation_budget")
        self.storage, self.scratch_folder = parse_precision(storage, "storage"), scratch_folder

    @classmethod
    def paper(cls, **kwargs: Any) -> "AdaQuant":
        """With the settings of the paper's code: layers, absolute rates, no decay, batches of 50. Other arguments as
        given."""
        return cls(**{"granularity": "layer", **PAPER, **kwargs})

    @override
    def clean_up(self) -> None:
        """Remove the finished units from the state folder."""
        if self.reconstruction.progress is not None:
            shutil.rmtree(self.reconstruction.progress, ignore_errors=True)

    @override
    def run(self, module: QuantizationModule) -> dict[str, float]:
        """Reconstruct the model unit by unit."""
        network, calibration, how = module.network, module.calibration, self.reconstruction
        with ActivationStore(self.activation_budget, self.storage, self.scratch_folder) as store:
            if self.candidates is None:
                results = adaquant(network, calibration, how, store, self.steps)
                self.exhibits = [reconstruction_exhibit(results)]
            else:
                by_width = adaquant_candidates(network, calibration, how, self.candidates, store, self.steps)
                results = [result for results in by_width.values() for result in results]
                self.exhibits = [reconstruction_exhibit(of_width, bits) for bits, of_width in by_width.items()]
        # A unit that could not be optimised has no errors.
        errors = [(r.error_before, r.error_after) for r in results if math.isfinite(r.error_before)] or [(0.0, 0.0)]
        return {
            "error_before": sum(before for before, _ in errors) / len(errors),
            "error_after": sum(after for _, after in errors) / len(errors),
            "units": float(len(results)),
            "restored": float(sum(not result.kept for result in results)),
            "step_seconds": sum(result.seconds for result in results),
            "captured_bytes": float(store.most_held),
        }
