"""Sensitivity: how much the loss rises when one layer takes a candidate width and all others stay at the base."""

from collections.abc import Sequence

from ..calibration.calibration_set import CalibrationSet
from ..calibration.logits import float_logits, measure_divergences
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits

Table = dict[str, dict[Bits, float]]


def measure_sensitivity(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    candidates: Sequence[Bits],
) -> Table:
    """Measure the rise of the KL divergence to the float logits for every free layer and candidate.

    The base is the candidate with the most bits, in all free layers at once. A layer keeps its present state for its
    present width (whatever stages have done to it before); it takes another width with the parameters
    that AdaQuant found for it there, if it has (``variants``), else with ranges alone.

    Args:
        network: Calibrated; left at the base.
        calibration: The samples.
        candidates: ``(weight_bits, activation_bits)`` pairs.

    Returns:
        Layer -> candidate -> rise of the divergence, in nats a sample; 0 for the base.
    """
    base = max(candidates, key=lambda bits: (sum(bits), bits))
    targets = float_logits(network, calibration)
    everything = list(range(len(calibration)))
    for name in network.free_layers:
        layer = network.layers[name]
        layer.variants[layer.bits] = layer.save()
        layer.take(base)
    at_base = float(measure_divergences(calibration, targets, everything).mean())
    table: Table = {}
    for name in network.free_layers:
        layer = network.layers[name]
        table[name] = {}
        for bits in candidates:
            rise = 0.0
            if bits != base:
                layer.take(bits)
                rise = float(measure_divergences(calibration, targets, everything).mean()) - at_base
            table[name][bits] = rise
        layer.take(base)
    return table
