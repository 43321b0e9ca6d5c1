"""Pipelines by name: which stages run, in which order, with which options."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

from ..callbacks.adaquant import AdaQuant
from ..callbacks.batch_norm_tuning import BatchNormTuning
from ..callbacks.bias_tuning import BiasTuning
from ..callbacks.bit_allocation import BitAllocation
from ..callbacks.calibration import Calibration
from ..callbacks.decision_costs import DecisionCosts
from ..callbacks.equalization import Equalization
from ..callbacks.stage import Stage
from ..quantization.ranges import RangeOptions
from ..reconstruction.equalizable import EqualizationOptions
from ..reconstruction.options import AdaQuantOptions
from ..tuning.bias import BiasTuningOptions
from .options import PipelineOptions

PipelineName = Literal["calibrate", "light", "advanced", "sequential", "mixed"]
PIPELINES: tuple[str, ...] = get_args(PipelineName)

Seeded = TypeVar("Seeded", AdaQuantOptions, BiasTuningOptions, EqualizationOptions, RangeOptions)


def make_stages(pipeline: str, options: PipelineOptions | Mapping[str, Any] | None = None) -> list[Stage]:
    """Stages of a pipeline, in order.

    - ``"calibrate"``: ranges only.
    - ``"light"``: ranges, bit allocation, equalization of inputs, BatchNorm tuning: no gradients.
    - ``"advanced"``: parallel AdaQuant of layers at every candidate, bit allocation over the results, BatchNorm and
      bias tuning.
    - ``"sequential"``: equalization of inputs, BatchNorm tuning, sequential AdaQuant at the given bit-widths, bias
      tuning.
    - ``"mixed"``: short parallel AdaQuant of layers at every candidate, bit allocation over the results, and then all
      of ``"sequential"`` from the float weights at the bit-widths chosen. With
      ``options={"allocation": {"sensitivity": ...}}`` the first part is left out.

    ``"light"``, ``"advanced"`` and ``"mixed"`` choose the bit-widths of all layers but the first, the last and
    overridden ones themselves, among ``allocation.candidates``; ``weight_bits`` and ``activation_bits`` then only say
    whether weights and activations are quantized at all.

    BatchNorm tuning measures the statistics of settled bit-widths, so it comes after bit allocation. Before sequential
    AdaQuant it gives a better start. After it, it would only do harm: an output of least error has less variance than
    its target, and BatchNorm tuning would blow it up again. Bias tuning comes last, since it corrects what is left, end
    to end.

    With ``options={"utility": ...}`` the stages minimise what mistakes cost where they name no other loss, and
    ``DecisionCosts`` comes last.

    Args:
        pipeline: One of the above.
        options: Options of the stages, or a nested mapping of those that differ from the defaults.

    Raises:
        ValueError: If ``pipeline`` is unknown or a value is out of its range.
        TypeError: If an option does not exist.

    Example:
        >>> [stage.name for stage in make_stages("sequential", {"adaquant": {"iterations": 200}})]
        ['Calibration', 'Equalization', 'BatchNormTuning', 'AdaQuant', 'BiasTuning']
    """
    if pipeline not in PIPELINES:
        raise ValueError(f"pipeline must be one of {', '.join(PIPELINES)}, got {pipeline!r}.")
    options = PipelineOptions.of(options)
    options = _with_costs(options)
    storage, folder = options.storage, options.state_folder
    adaquant, preparation = (_seeded(of, options.seed) for of in (options.adaquant, options.preparation))
    allocation, candidates = options.allocation, options.allocation.candidates
    stages: list[Stage] = [Calibration(_seeded(options.calibration, options.seed), state_folder=folder)]
    if pipeline == "mixed":
        if allocation.sensitivity is None:
            kept = None if folder is None else folder / "candidates"
            preparing = _for_candidates(preparation)
            stages.append(AdaQuant(preparing, candidates=candidates, storage=storage, state_folder=kept))
        allocation = replace(allocation, reset_to_float=True)
        stages.append(BitAllocation(allocation, storage=storage, state_folder=folder))
    if pipeline in ("sequential", "mixed"):
        stages.append(Equalization(_seeded(options.equalization, options.seed), storage=storage))
        stages.append(BatchNormTuning(options.batch_norm_tuning, storage=storage))
        stages.append(AdaQuant(adaquant, storage=storage, state_folder=folder))
    if pipeline == "advanced":
        preparing = _for_candidates(adaquant)
        stages.append(AdaQuant(preparing, candidates=candidates, storage=storage, state_folder=folder))
    if pipeline in ("light", "advanced"):
        stages.append(BitAllocation(allocation, storage=storage, state_folder=folder))
        if pipeline == "light":
            stages.append(Equalization(_seeded(options.equalization, options.seed), storage=storage))
        stages.append(BatchNormTuning(options.batch_norm_tuning, storage=storage))
    if pipeline in ("advanced", "sequential", "mixed"):
        stages.append(BiasTuning(_seeded(options.bias_tuning, options.seed)))
    if options.utility is not None:
        stages.append(DecisionCosts(options.utility))
    return stages


def _with_costs(options: PipelineOptions) -> PipelineOptions:
    """Options whose stages minimise what mistakes cost, where that is known and they name no loss of their own."""
    utility = options.utility
    if utility is None:
        return options
    adaquant, preparation = (
        of if of.loss is not None else replace(of, loss=utility) for of in (options.adaquant, options.preparation)
    )
    allocation, tuning = options.allocation, options.bias_tuning
    if allocation.metric == "kl":
        allocation = replace(allocation, metric=utility)
    if tuning.divergence == "kl":
        tuning = replace(tuning, divergence=utility)
    return replace(options, adaquant=adaquant, preparation=preparation, allocation=allocation, bias_tuning=tuning)


def _seeded(options: Seeded, seed: int | None) -> Seeded:
    """A stage's options with the pipeline's seed, if it has one."""
    return options if seed is None else replace(options, seed=seed)


def _for_candidates(options: AdaQuantOptions) -> AdaQuantOptions:
    """States at several bit-widths exist of layers only, each reconstructed by itself."""
    return replace(options, mode="parallel", granularity="layer", blocks=())
