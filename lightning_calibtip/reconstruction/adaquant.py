"""AdaQuant over a whole model (Hubara et al. 2021): unit by unit, on float or on quantized inputs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.recording import Recording
from ..calibration.replay import Replay, UnitCall
from ..calibration.steps import Steps, part_of, untold
from ..quantization.network import QuantizedNetwork
from .importance import Loss, measure_importance, token_weights
from .optimize import UnitResult, optimize_unit, output_tensors
from .progress import Progress, describe_run
from .samples import UnitSamples
from .settings import MODES, AdaQuantSettings
from .units import GRANULARITIES, Unit, find_units

log = logging.getLogger(__name__)

# Samples on which it is tried whether a unit can be run on a part of a batch, and the relative difference that other
# kernels for other batch sizes may make (mixing samples up makes one of about 1).
_ROWS_TRIED, _TOLERANCE = 8, 0.1


@dataclass
class Reconstruction:
    """What is reconstructed, and in which way.

    Args:
        settings: Of the optimiser.
        mode: ``"sequential"``: a unit's inputs come from the already quantized units before it, its target from the
            float model, so that each unit also makes up for the errors of those before. ``"parallel"``: the inputs come
            from the float model.
        granularity: ``"layer"`` or ``"block"`` (see ``find_units``).
        blocks: Names or patterns of modules that are to be units.
        loss: ``loss(output, batch)``; weights each output element's error by its squared gradient (Fisher weighting).
        progress: Folder for the finished units, from which a killed run goes on; None to keep none.

    Raises:
        ValueError: If ``mode`` or ``granularity`` is unknown, ``blocks`` is no list or ``loss`` no function.
    """

    settings: AdaQuantSettings = field(default_factory=AdaQuantSettings)
    mode: str = "sequential"
    granularity: str = "block"
    blocks: Sequence[str] = ()
    loss: Loss | None = None
    progress: Path | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}.")
        if isinstance(self.blocks, str):
            raise ValueError(f"blocks must be a list of names or patterns, got {self.blocks!r}.")
        if self.loss is not None and not callable(self.loss):
            raise ValueError(f"loss must be a function loss(output, batch), got {self.loss!r}.")


def adaquant(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    how: Reconstruction | None = None,
    store: ActivationStore | None = None,
    steps: Steps = untold,
) -> list[UnitResult]:
    """Reconstruct every unit of a calibrated model in place.

    Two streams run through the model, unit by unit: the float one gives the targets, the quantized one, in sequential
    mode, the inputs. Both replay what is finished, so the cost is linear in the depth.

    Args:
        network: Calibrated.
        calibration: The samples.
        how: See ``Reconstruction``.
        store: Where captured activations are kept; all in memory if None.
        steps: Told of the optimiser's steps over all units.

    Returns:
        A result for each unit, in the order of execution.

    Raises:
        RuntimeError: If the model is not calibrated, or there is no calibration batch.
        ValueError: If a name in ``blocks`` is unknown, or ``progress`` holds another run.
        OSError: If activations are to go to a disk that has no room for them.
    """
    how, store = how or Reconstruction(), store or ActivationStore()
    if not network.calibrated:
        raise RuntimeError("AdaQuant starts from calibrated ranges: run Calibration first.")
    calibration.require()
    units = find_units(network, how.granularity, how.blocks)
    progress = None if how.progress is None else _open_progress(how, units, network, calibration, store)
    assert network.structure is not None
    names = [unit.name for unit in units]
    float_stream, quantized_stream = (
        Replay(network.model, network.structure, calibration, names, store) for _ in range(2)
    )
    importance: dict[str, Recording] = {}
    if how.loss is not None:
        importance = measure_importance(network, calibration, units, float_stream, how.loss)
    weighs = how.loss is not None or calibration.padded
    results = []
    for position, unit in enumerate(units):
        result = progress.load(position, unit) if progress else None
        keeps = result is None and (how.mode == "parallel" or how.settings.drop_probability > 0)
        with network.quantized(False):
            float_inputs, targets, weights = _run_float(
                unit, float_stream, keeps, importance.pop(unit.name, None), weighs and result is None
            )
        inputs = float_inputs
        if how.mode == "sequential":
            inputs = quantized_stream.recording(unit.name, unit.prefers_channels_last)
            for calls in quantized_stream.capture(unit.name):
                for call in calls:
                    inputs.append((call.args, call.kwargs))
        if result is None:
            assert inputs is not None
            drawn = float_inputs if how.mode == "sequential" else None
            told = part_of(steps, position, len(units))
            result = _optimize(unit, inputs, targets, drawn, weights, how.settings, told)
            if progress:
                progress.save(position, unit, result)
        results.append(result)
        iterations = how.settings.iterations
        summary = f"{unit.name}: relative error {result.error_before:.3g} to {result.error_after:.3g}"
        steps((position + 1) * iterations, len(units) * iterations, summary)
        float_stream.finish(unit.name, targets)
        if how.mode == "sequential":
            assert inputs is not None
            quantized_stream.finish(unit.name, _outputs(unit, inputs, quantized_stream))
        for recording in (inputs, float_inputs, weights):
            if recording is not None:
                recording.forget()
    for stream in (float_stream, quantized_stream):
        stream.forget()
    return results


def _optimize(
    unit: Unit,
    inputs: Recording,
    targets: Recording,
    float_inputs: Recording | None,
    importance: Recording | None,
    settings: AdaQuantSettings,
    steps: Steps,
) -> UnitResult:
    """Optimise a unit; one that cannot be is left as it is, with a warning that says why."""
    try:
        return optimize_unit(unit, _samples(unit, inputs, targets, float_inputs, importance), settings, steps)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        note = f"it cannot be optimised ({type(error).__name__}: {error})"
        log.warning("%s: left as it was before AdaQuant: %s.", unit.name, note)
        layers = tuple(layer.name for layer in unit.layers)
        return UnitResult(unit.name, layers, float("nan"), float("nan"), False, note, 0.0)


@torch.no_grad()
def _run_float(
    unit: Unit, stream: Replay, keep_inputs: bool, importance: Recording | None, weighs: bool
) -> tuple[Recording | None, Recording, Recording | None]:
    """Run a unit at all its calls.

    Args:
        unit: The unit.
        stream: Of the float model.
        keep_inputs: Whether its inputs will be wanted.
        importance: Of its outputs' elements, by the loss; None for all alike.
        weighs: Whether there is importance, or padding, which has none.

    Returns:
        Inputs, if they are to be kept; outputs; and the importance of these, padding left out, if it ``weighs``.
    """
    inputs, outputs = (stream.recording(unit.name, unit.prefers_channels_last) for _ in range(2))
    weights = stream.recording(unit.name, unit.prefers_channels_last)
    for index, calls in enumerate(stream.capture(unit.name)):
        for call in calls:
            if keep_inputs:
                inputs.append((call.args, call.kwargs))
            output = unit(call)
            if weighs:
                given = None if importance is None else importance[len(outputs)]
                weights.append(token_weights(unit, output, stream.calibration.tokens(index), given))
            outputs.append(output)
    if importance is not None:
        importance.forget()
    return inputs if keep_inputs else None, outputs, weights if weighs else None


@torch.no_grad()
def _outputs(unit: Unit, inputs: Recording, stream: Replay) -> Recording:
    outputs = stream.recording(unit.name, unit.prefers_channels_last)
    for position in range(len(inputs)):
        outputs.append(unit(UnitCall(*inputs[position])))
    return outputs


def _samples(
    unit: Unit, inputs: Recording, targets: Recording, float_inputs: Recording | None, importance: Recording | None
) -> UnitSamples:
    """The unit's samples, split along the first dimension only if the unit gives the same on a part of them.

    Raises:
        ValueError: If batches call the unit with differently nested arguments.
    """
    with torch.no_grad():
        outputs = output_tensors(unit, unit(UnitCall(*inputs[0])))
    # Rows of convolutions come channels-last, which code with views of its own may not take.
    for contiguous in (False, True) if unit.prefers_channels_last else (False,):
        for shares in (True, False):
            samples = UnitSamples(inputs, targets, float_inputs, importance, shares, contiguous)
            if not samples.whole and _gives_the_same_by_rows(unit, samples, outputs):
                return samples
    return UnitSamples(inputs, targets, float_inputs, importance, whole=True)


@torch.no_grad()
def _gives_the_same_by_rows(unit: Unit, samples: UnitSamples, outputs: list[Tensor]) -> bool:
    """Whether some samples of the first call, drawn by rows, have the ``outputs`` that they have in the whole call."""
    count = len(outputs[0])
    rows = torch.arange(0, count, 2)[:_ROWS_TRIED]
    try:
        drawn = output_tensors(unit, unit(samples.take(rows).call))
    except Exception:
        # The unit's own code, which does not take what it was tried with.
        return False
    for output, part in zip(outputs, drawn, strict=True):
        wanted = output[rows.to(output.device)] if output.dim() and len(output) == count else output
        if part.shape != wanted.shape or float((part - wanted).norm()) > _TOLERANCE * max(float(output.norm()), 1e-20):
            return False
    return True


def _open_progress(
    how: Reconstruction,
    units: Sequence[Unit],
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    store: ActivationStore,
) -> Progress:
    assert how.progress is not None
    device = next(iter(network.layers.values())).weight.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    settings = {
        "settings": how.settings,
        "mode": how.mode,
        "granularity": how.granularity,
        "loss": how.loss and f"{how.loss.__module__}.{how.loss.__qualname__}",
        "storage": store.precision,
        "precision": autocast,
        "float model": network.fingerprint,
    }
    return Progress(how.progress, describe_run(units, list(network.layers.values()), calibration, settings))
