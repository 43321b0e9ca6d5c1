"""Measuring the model with one layer after the other changed, at the cost of what follows the layer."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.shared import work_of
from .activation_store import ActivationStore
from .calibration_set import output_logits
from .losses import Loss
from .replay import CalledAgainError, NotReachedError, Replay

log = logging.getLogger(__name__)

# Relative difference of outputs that other memory layouts may make.
_TOLERANCE = 1e-3

Run = Callable[[int], Any]


def visit_layers(
    network: QuantizedNetwork,
    loss: Loss,
    names: Sequence[str],
    visit: Callable[[QuantizedLayer, Run], None],
    store: ActivationStore | None = None,
) -> None:
    """Call ``visit(layer, run)`` for each layer in the order of execution, where ``loss(run)`` measures the model with
    the layer as the visitor has changed it. The visitor leaves the layer as it was.

    What comes before the layer is replayed, so that a measurement costs the layer and what follows it. Whether the
    replayed model still gives the same output is tried on one batch for each layer; where a model does not allow it
    (values that leave the graph, side effects), a warning says so and the rest is measured by whole passes. So are
    layers inside other layers, weights that are parts of other modules, and what some batch does not reach.

    Args:
        network: Calibrated network, quantized or shown in float.
        loss: What is measured, and on which samples.
        names: Names of the layers.
        visit: The visitor.
        store: Store of captured activations; all in memory if None.

    Example:
        See ``measure_sensitivity``.
    """
    assert network.structure is not None
    visited = _visit_by_replay(network, loss, names, visit, store or ActivationStore())
    for name in names:
        if name not in visited:
            visit(network.layers[name], loss.calibration.run)


def _visit_by_replay(
    network: QuantizedNetwork,
    loss: Loss,
    names: Sequence[str],
    visit: Callable[[QuantizedLayer, Run], None],
    store: ActivationStore,
) -> set[str]:
    """Visit as many layers as replay serves; returns their names."""
    assert network.structure is not None
    # What would be stored of a part is a weight, once for each batch.
    parts = {name for name in names if network.layers[name].type.part}
    running = [name for name in network.structure.calls_of if name in set(names) - parts]
    units = [name for name in running if not any(name.startswith(f"{other}.") for other in running)]
    stream = Replay(network.model, network.structure, loss.calibration, units, store, to_end=True)
    wanted = _output(loss, loss.calibration.run)
    visited = set()
    for name in units:
        try:
            outputs = stream.record(name).outputs
            if right := _is_close(_output(loss, stream.run), wanted):
                visit(network.layers[name], stream.run)
        except NotReachedError:
            continue
        except CalledAgainError:
            right = False
        if not right:
            log.warning("%s: the model cannot be replayed from here on; the rest is measured by whole passes.", name)
            break
        visited.add(name)
        assert outputs is not None
        stream.finish(name, outputs)
    stream.forget()
    return visited


@torch.no_grad()
def _output(loss: Loss, run: Run) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in output_logits(run(0))]


def _is_close(output: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(
        found.shape == right.shape and float((found - right).norm()) <= _TOLERANCE * float(right.norm())
        for found, right in zip(output, wanted, strict=True)
    )


def owners_of(network: QuantizedNetwork, names: Sequence[str]) -> dict[str, int]:
    """The rank that measures each layer: replay computes what follows a layer again for each measurement.

    Args:
        network: Prepared network.
        names: Names of the layers.

    Example:
        See ``measure_sensitivity``.
    """
    assert network.structure is not None
    structure, remaining = network.structure, 0.0
    costs: dict[str, float] = {}
    for name in reversed([name for name in structure.calls_of if name in network.layers]):
        remaining += work_of(network.layers[name], structure)
        costs[name] = remaining
    return dict(zip(names, ranks.deal([costs.get(name, remaining) for name in names]), strict=True))
