"""AdaQuant at several widths: a reconstructed state of each layer for every candidate of bit allocation."""

from collections.abc import Sequence
from dataclasses import replace

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.steps import Steps, part_of, untold
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits
from .adaquant import Reconstruction, adaquant
from .optimize import UnitResult


def check_candidates(how: Reconstruction, candidates: Sequence[Bits]) -> None:
    """Raise ``ValueError`` unless there are candidates, to be reconstructed in parallel and layer by layer."""
    if (how.mode, how.granularity, len(how.blocks)) != ("parallel", "layer", 0) or not candidates:
        raise ValueError(
            f'candidates must not be empty and need mode="parallel", granularity="layer" and no blocks, got '
            f"{list(candidates)}, {how.mode!r}, {how.granularity!r} and {list(how.blocks)}: states that were "
            "reconstructed together cannot be mixed."
        )


def adaquant_candidates(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    how: Reconstruction,
    candidates: Sequence[Bits],
    store: ActivationStore | None = None,
    steps: Steps = untold,
) -> dict[Bits, list[UnitResult]]:
    """Run parallel AdaQuant at each candidate width and keep the results as each layer's ``variants``.

    Only parallel reconstruction of single layers makes states that can be mixed: a sequential one assumes the widths of
    the layers before it. Layers with a fixed width are reconstructed at that one. Afterwards each free layer is at its
    own width if that is a candidate, else at the widest.

    Args:
        network: Calibrated.
        calibration: The samples.
        how: Parallel, by layers.
        candidates: Pairs ``(weight_bits, activation_bits)``.
        store: Where captured activations are kept; all in memory if None.
        steps: Told of the optimiser's steps over all units and candidates.

    Returns:
        The units' results by candidate.

    Raises:
        ValueError: If ``how`` is sequential or by blocks, or there is no candidate.
    """
    check_candidates(how, candidates)
    own = {name: network.layers[name].bits for name in network.free_layers}
    widest = max(candidates, key=lambda bits: (sum(bits), bits))
    fixed = {name: network.layers[name].save() for name in network.fixed if name in network.layers}
    results = {}
    for position, bits in enumerate(candidates):
        for name in network.free_layers:
            network.layers[name].variants.pop(bits, None)
            network.layers[name].take(bits)
        for name, state in fixed.items():
            network.layers[name].restore(state)
        folder = how.progress and how.progress / f"w{bits[0]}a{bits[1]}"
        told = part_of(steps, position, len(candidates), f"W{bits[0]}A{bits[1]} ")
        results[bits] = adaquant(network, calibration, replace(how, progress=folder), store, told)
        for name in network.free_layers:
            network.layers[name].variants[bits] = network.layers[name].save()
    for name, bits in own.items():
        network.layers[name].take(bits if bits in results else widest)
    return results
