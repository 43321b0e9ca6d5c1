"""AdaQuant over a whole model (Hubara et al. 2021): unit by unit, on float or on quantized inputs."""

import logging
import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .. import ranks
from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.progress import ProgressCallback, no_progress, part_of
from ..calibration.replay import NotReachedError, Replay
from ..files.state_folder import holding
from ..network.dataflow import reads_chosen_samples
from ..network.network import QuantizedNetwork
from ..network.shared import take_states_of_first, work_of
from ..network.states import LayerState
from ..quantization.quantizers import Quantizer
from .data_parallel import deal_units
from .feedback import FEEDBACK, check_feedback
from .float_stream import FloatStream
from .optimize import UnitResult, optimize_unit
from .options import AdaQuantOptions
from .resume import FinishedUnits, describe_run
from .rounding import rounding_method
from .unit_data import UnitData, split_by_samples
from .units import Unit, find_units

log = logging.getLogger(__name__)


def adaquant(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: AdaQuantOptions | None = None,
    store: ActivationStore | None = None,
    state_folder: Path | None = None,
    progress: ProgressCallback = no_progress,
) -> list[UnitResult]:
    """Reconstruct every unit of a calibrated model in place.

    Two streams run through the model, unit by unit: the float one gives the targets, the quantized one, in sequential
    mode, the inputs. Both replay what is finished, so the cost is linear in the depth. The scale of a tensor that
    several units read is learned by the first of them.

    Args:
        network: Calibrated network.
        calibration: Calibration set.
        options: See ``AdaQuantOptions``; the defaults if None.
        store: Store of captured activations; all in memory if None.
        state_folder: Folder for the finished units, from which a killed run is resumed; None to keep none.
        progress: Progress callback, over the optimiser's steps on all units.

    Returns:
        A result for each unit, in the order of execution.

    Raises:
        RuntimeError: If the model is not calibrated, there is no calibration batch, or another process is at work in
            ``state_folder``.
        ValueError: If a name in ``blocks`` is unknown, the rounding method cannot round a layer's weight, or
            ``state_folder`` holds another run, or something else.
        OSError: If activations are to go to a disk that has no room for them.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(64, 4))
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=3, activation_bits=8, edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> results = adaquant(network, calibration, AdaQuantOptions(iterations=10))
        >>> [result.name for result in results], all(r.error_after <= r.error_before for r in results)
        (['0', '2'], True)
    """
    with holding(state_folder):
        return _adaquant(
            network, calibration, options or AdaQuantOptions(), store or ActivationStore(), state_folder, progress
        )


def _adaquant(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: AdaQuantOptions,
    store: ActivationStore,
    state_folder: Path | None,
    progress: ProgressCallback,
) -> list[UnitResult]:
    units = [unit for unit in prepare_units(network, calibration, options) if unit.is_quantized]
    finished = None
    if state_folder is not None:
        finished = open_finished(state_folder, options, units, network, calibration, store)
    assert network.structure is not None
    names = [unit.name for unit in units]
    quantized_stream = Replay(network.model, network.structure, calibration, names, store)
    floats = FloatStream(network, calibration, options, units, store)
    is_sequential = options.mode == "sequential"
    results: list[UnitResult] = []
    used: set[Quantizer] = set()
    # Units that depend on float inputs alone are dealt out; those in sequence are worked on by all ranks together.
    structure = network.structure
    owners = deal_units(units, [sum(work_of(layer, structure) for layer in unit.layers) for unit in units])
    # Parallel units are given what the float model gives them.
    chosen = {
        unit.name for unit in units if is_sequential and reads_chosen_samples(structure, unit.name, network.layers)
    }
    for position, unit in enumerate(units):
        is_mine = is_sequential or owners[position] == ranks.rank()
        result = _load(finished, position, unit, is_sequential, is_mine)
        waits = result is None and not is_mine
        keeps_inputs = result is None and is_mine and (not is_sequential or options.drop_probability > 0)
        record, channels_last = None, unit.prefers_channels_last
        try:
            record = floats.record(unit, keeps_inputs, weighs=result is None and is_mine)
            inputs = record.inputs
            if is_sequential:
                inputs = quantized_stream.record(unit.name, True, False, channels_last).inputs
        except NotReachedError as error:
            # Both streams go on computing it wherever it is called.
            results.append(left_as_it_was(unit, str(error)))
            if record is not None:
                floats.finish(unit, record)
            continue
        if waits:
            # Its owner tells of it at the end.
            result = _waiting(unit)
        elif result is None:
            assert inputs is not None
            recorded = UnitData(inputs, record.targets, record.inputs if is_sequential else None, record.weights)
            if is_sequential and (unit.name in chosen or inputs.shapes() != record.shapes):
                # As one of several experts it is given other samples in the quantized model than in the float one.
                with network.quantized(False):
                    recorded = UnitData(inputs, quantized_stream.record_again(unit.name, inputs, channels_last))
            with nullcontext() if is_sequential else ranks.alone():
                result = reconstruct(unit, recorded, options, used, part_of(progress, position, len(units)))
            if recorded.targets is not record.targets:
                recorded.targets.forget()
            if is_sequential:
                take_states_of_first(unit.layers)
                result = ranks.from_first(result)
            if finished and (not is_sequential or ranks.rank() == 0):
                finished.save(position, unit, result)
        assert result is not None
        results.append(result)
        text = f"{unit.name}: on another rank" if waits else summary_of(result)
        progress((position + 1) * options.iterations, len(units) * options.iterations, text)
        used.update(quantizer for layer in unit.layers for quantizer in layer.quantizers)
        floats.finish(unit, record)
        if is_sequential:
            assert inputs is not None
            if unit is not units[-1]:
                outputs = quantized_stream.record_again(unit.name, inputs, channels_last)
                quantized_stream.finish(unit.name, outputs)
            inputs.forget()
    floats.forget()
    quantized_stream.forget()
    return results if is_sequential else _exchange(units, results, owners)


def _load(
    finished: FinishedUnits | None, position: int, unit: Unit, is_sequential: bool, is_mine: bool
) -> UnitResult | None:
    """A unit that an earlier run has finished. In sequence, rank 0 says whether there is one."""
    if finished is None or not is_mine:
        return None
    if not is_sequential:
        return finished.load(position, unit)
    result = ranks.from_first(finished.load(position, unit) if ranks.rank() == 0 else None)
    if result is not None:
        take_states_of_first(unit.layers)
    return result


def _waiting(unit: Unit) -> UnitResult:
    return UnitResult(unit.name, tuple(layer.name for layer in unit.layers), 0.0, 0.0, True, "on another rank", 0.0)


def _exchange(units: Sequence[Unit], results: list[UnitResult], owners: Sequence[int]) -> list[UnitResult]:
    """Give all ranks the units that each has reconstructed, and their results."""
    if ranks.rank_count() == 1:
        return results
    mine = {
        position: (result, [ranks.to_cpu(layer.save().to_dict()) for layer in units[position].layers])
        for position, result in enumerate(results)
        if owners[position] == ranks.rank()
    }
    for found in ranks.from_all(mine):
        for position, (result, states) in found.items():
            results[position] = result
            for layer, state in zip(units[position].layers, states, strict=True):
                layer.restore(LayerState.from_dict(state))
    return results


def prepare_units(network: QuantizedNetwork, calibration: CalibrationSet, options: AdaQuantOptions) -> list[Unit]:
    """The units to reconstruct, once it is certain that they can be. See ``adaquant``.

    Raises:
        RuntimeError: If the model is not calibrated, or there is no calibration batch.
        ValueError: If a name in ``blocks`` is unknown, or the rounding method cannot round a layer's weight.
    """
    if not network.calibrated:
        raise RuntimeError("AdaQuant starts from calibrated ranges: run Calibration first.")
    calibration.require()
    units = find_units(network, options.granularity, options.blocks)
    for layer in (layer for unit in units for layer in unit.layers):
        if layer.weight_quantizer is not None:
            if options.start == FEEDBACK:
                check_feedback(layer)
            rounding_method(options.rounding).check(layer)
    return units


def summary_of(result: UnitResult) -> str:
    """One line about a result, for progress callbacks.

    Example:
        >>> summary_of(UnitResult("conv1", ("conv1",), 0.25, 0.125, True, "", 1.0))
        'conv1: relative error 0.25 to 0.125'
    """
    return f"{result.name}: relative error {result.error_before:.3g} to {result.error_after:.3g}"


def reconstruct(
    unit: Unit,
    recorded: UnitData,
    options: AdaQuantOptions,
    fixed: AbstractSet[Quantizer],
    progress: ProgressCallback,
) -> UnitResult:
    """Optimise a unit; one that cannot be is left as it is, with a warning that says why. See ``optimize_unit``.

    Args:
        unit: The unit.
        recorded: What is recorded of it.
        options: See ``AdaQuantOptions``.
        fixed: Quantizers of the unit that must not change.
        progress: Progress callback.

    Raises:
        OSError: If a disk is full; likewise errors for want of memory, and whatever else is no ``RuntimeError`` or
            ``ValueError``, as PyTorch raises where there is no gradient.
    """
    try:
        return optimize_unit(unit, split_by_samples(unit, recorded), options, fixed, progress)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return left_as_it_was(unit, f"it cannot be optimised ({type(error).__name__}: {error})")


def left_as_it_was(unit: Unit, note: str) -> UnitResult:
    """The result of a unit that is not reconstructed, for a reason that a warning gives.

    Args:
        unit: The unit.
        note: The reason.

    Example:
        >>> from torch import nn
        >>> left_as_it_was(Unit("conv1", nn.Identity(), (), None), "it is not reached").kept
        False
    """
    log.warning("%s: left as it was before AdaQuant: %s.", unit.name, note)
    return UnitResult(unit.name, tuple(layer.name for layer in unit.layers), math.nan, math.nan, False, note, 0.0)


def open_finished(
    folder: Path,
    options: AdaQuantOptions,
    units: Sequence[Unit],
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    store: ActivationStore,
    **settings: Any,
) -> FinishedUnits:
    """The finished units in a folder, if it belongs to this reconstruction. See ``FinishedUnits``.

    Args:
        folder: Folder of the reconstruction.
        options: Its options.
        units: Its units.
        network: Network in its state before it.
        calibration: Calibration set.
        store: Store of its activations.
        settings: What else the result depends on.

    Raises:
        ValueError: If the folder belongs to another reconstruction.
    """
    if ranks.rank_count() > 1 and ranks.rank() > 0:
        # Rank 0 describes the run, or refuses it, first.
        ranks.from_first(None)
    device = next(iter(network.layers.values())).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    described = {
        **options.describe(),
        "storage": store.precision,
        "inputs with ratios to learn": [tensor.name for tensor in network.tensors if tensor.learnable is not None],
        "precision": autocast,
        "float model": network.fingerprint,
        **settings,
    }
    finished = FinishedUnits(folder, describe_run(units, list(network.layers.values()), calibration, described))
    if ranks.rank() == 0:
        ranks.from_first(None)
    return finished
