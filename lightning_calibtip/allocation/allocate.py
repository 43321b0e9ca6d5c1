"""Bit allocation over a whole model: measure, solve, apply."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..calibration.calibration_set import CalibrationSet
from ..quantization.network import QuantizedNetwork
from ..quantization.scheme import Bits
from .integer_program import InfeasibleBudgetError, choose_candidates
from .sensitivity import Table, measure_sensitivity


@dataclass(frozen=True)
class Allocation:
    """Outcome of a bit allocation.

    Args:
        bits: Chosen ``(weight_bits, activation_bits)`` of each free layer.
        predicted_loss: Sum of the chosen sensitivities, in nats a sample.
        compression: Reached share of 32 bits a weight, over all quantizable layers.
        sensitivity: The table that was solved.
    """

    bits: dict[str, Bits]
    predicted_loss: float
    compression: float
    sensitivity: Table


def allocate(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    candidates: Sequence[Bits],
    compression: float,
) -> Allocation:
    """Give each free layer the width that together lose least within a weight budget, in place.

    Layers whose width is fixed (first, last, overrides) keep it and count against the budget.

    Args:
        network: Calibrated.
        calibration: The samples.
        candidates: ``(weight_bits, activation_bits)`` pairs.
        compression: Budget, as the paper's: weight bits of the quantizable layers over 32 bits each; above 0 and at
            most 1.

    Raises:
        RuntimeError: If the model is not calibrated or there is no calibration batch.
        InfeasibleBudgetError: If no choice fits; states the range of ``compression`` that is reachable.
        ValueError: If no layer is free, or a sensitivity is not finite (names layer and width).
    """
    if not network.calibrated:
        raise RuntimeError("Bit allocation measures the quantized model: run Calibration first.")
    calibration.require()
    if not network.free_layers:
        raise ValueError("No layer's width is free: overrides and edge_bits fix them all.")
    whole = 32 * network.quantizable_parameters
    fixed = network.weight_bits_total - sum(_weight_bits(network, name) for name in network.free_layers)
    costs = {
        name: {bits: network.layers[name].weight.numel() * bits[0] / whole for bits in candidates}
        for name in network.free_layers
    }
    budget = compression - fixed / whole
    reachable = [sum(pick(of_layer.values()) for of_layer in costs.values()) + fixed / whole for pick in (min, max)]
    if compression < reachable[0] * (1 - 1e-9):
        raise InfeasibleBudgetError(
            f"compression={compression} is out of reach: with these candidates and fixed layers it can be "
            f"{reachable[0]:.4f} to {reachable[1]:.4f}. Raise it, or add a narrower candidate."
        )
    sensitivity = measure_sensitivity(network, calibration, candidates)
    choice = choose_candidates(sensitivity, costs, budget)
    for name, bits in choice.candidates.items():
        network.layers[name].take(bits)
    return Allocation(choice.candidates, choice.predicted_loss, choice.cost + fixed / whole, sensitivity)


def _weight_bits(network: QuantizedNetwork, name: str) -> int:
    layer = network.layers[name]
    return layer.weight.numel() * layer.bits[0]
