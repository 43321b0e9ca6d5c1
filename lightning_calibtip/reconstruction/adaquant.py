"""AdaQuant over a whole model (Hubara et al. 2021): unit by unit, on float or on quantized inputs."""

import torch

from ..calibration.calibration_set import CalibrationSet
from ..calibration.replay import Replay, UnitCall
from ..quantization.network import QuantizedNetwork
from .optimize import UnitResult, optimize_unit, output_tensors
from .samples import Target, UnitSamples
from .settings import MODES, AdaQuantSettings
from .units import Unit, find_units


def adaquant(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    settings: AdaQuantSettings,
    mode: str = "sequential",
    granularity: str = "layer",
) -> list[UnitResult]:
    """Reconstruct every unit of a calibrated model in place.

    In sequential mode a unit's inputs come from the already quantized units before it, its target from the float model,
    so that each unit also makes up for the errors of those before. In parallel mode the inputs come from
    the float model.

    Args:
        network: Calibrated.
        calibration: The samples.
        settings: Of the optimiser.
        mode: ``"parallel"`` or ``"sequential"``.
        granularity: ``"layer"`` or ``"block"`` (see ``find_units``).

    Returns:
        A result for each unit, in the order of execution.

    Raises:
        RuntimeError: If the model is not calibrated, or there is no calibration batch.
        ValueError: If ``mode`` or ``granularity`` is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if not network.calibrated:
        raise RuntimeError("AdaQuant starts from calibrated ranges: run Calibration first.")
    calibration.require()
    units = find_units(network, granularity)
    assert network.structure is not None
    streams = [
        Replay(network.model, network.structure, calibration, [unit.name for unit in units])
        for _ in range(2 if mode == "sequential" else 1)
    ]
    float_stream, quantized_stream = streams[0], streams[-1]
    generator = torch.Generator().manual_seed(settings.seed)
    results = []
    for unit in units:
        with network.quantized(False):
            float_calls = float_stream.capture(unit.name)
            with torch.no_grad():
                float_outputs = [[unit(call) for call in calls] for calls in float_calls]
                targets = [[t.detach() for t in output_tensors(unit, o)] for calls in float_outputs for o in calls]
            samples = _join(unit, float_calls, targets)
        float_stream.finish(unit.name, float_outputs)
        calls_in = float_calls
        if mode == "sequential":
            calls_in = quantized_stream.capture(unit.name)
            samples = UnitSamples.join([call for calls in calls_in for call in calls], targets, samples.whole)
        results.append(optimize_unit(unit, samples, settings, generator))
        if mode == "sequential":
            with torch.no_grad():
                quantized_stream.finish(unit.name, [[unit(call) for call in calls] for calls in calls_in])
    return results


@torch.no_grad()
def _join(unit: Unit, calls_in: list[list[UnitCall]], targets: list[Target]) -> UnitSamples:
    """Float samples of a unit, split along the first dimension only if the float unit gives the same on a part of them.

    Raises:
        ValueError: If batches call the unit with differently nested arguments; names the unit.
    """
    calls = [call for calls in calls_in for call in calls]
    try:
        samples = UnitSamples.join(calls, targets)
    except ValueError as error:
        raise ValueError(f"{unit.name}: {error}; leave it float with overrides={{...: None}}.") from error
    part = torch.arange(0, samples.count, 2)[:8]
    if samples.whole:
        return samples
    try:
        call, wanted = samples.take(part)
        outputs = output_tensors(unit, unit(call))
    except RuntimeError:
        return UnitSamples.join(calls, targets, whole=True)
    same = all(
        got.shape == want.shape and torch.allclose(got, want, rtol=1e-2, atol=1e-3 * float(want.abs().max()))
        for got, want in zip(outputs, wanted, strict=True)
    )
    return samples if same else UnitSamples.join(calls, targets, whole=True)
