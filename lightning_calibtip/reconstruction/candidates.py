"""AdaQuant at several widths: a reconstructed state of each layer for every candidate of bit allocation."""

from collections.abc import Sequence

from ..calibration.calibration_set import CalibrationSet
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits
from .adaquant import adaquant
from .optimize import UnitResult
from .settings import AdaQuantSettings


def adaquant_candidates(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    settings: AdaQuantSettings,
    candidates: Sequence[Bits],
) -> dict[Bits, list[UnitResult]]:
    """Run parallel AdaQuant at each candidate width and keep the results as each layer's ``variants``.

    Only parallel reconstruction of single layers makes states that can be mixed: a sequential one assumes the widths of
    the layers before it. Layers with a fixed width are reconstructed at that one. Afterwards each free layer is at its
    own width if that is a candidate, else at the widest.

    Returns:
        The units' results by candidate.
    """
    own = {name: network.layers[name].bits for name in network.free_layers}
    widest = max(candidates, key=lambda bits: (sum(bits), bits))
    fixed = {name: network.layers[name].save() for name in network.fixed if name in network.layers}
    results = {}
    for bits in candidates:
        for name in network.free_layers:
            network.layers[name].variants.pop(bits, None)
            network.layers[name].take(bits)
        for name, state in fixed.items():
            network.layers[name].restore(state)
        results[bits] = adaquant(network, calibration, settings, "parallel")
        for name in network.free_layers:
            network.layers[name].variants[bits] = network.layers[name].save()
    for name, bits in own.items():
        network.layers[name].take(bits if bits in results else widest)
    return results
