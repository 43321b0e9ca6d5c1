"""Measuring a network again and again while the scales of one layer after the other change: what comes before the layer
that changes answers with stored outputs."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet, output_logits
from ..calibration.replay import CalledAgainError, NotReachedError, Replay
from ..network.network import QuantizedNetwork
from ..quantization.quantizers import Quantizer

log = logging.getLogger(__name__)

# Outputs beyond this many bytes go to files.
_BUDGET = 2**30

# What replay gives may differ from a whole pass by rounding.
_TOLERANCE = 1e-4


class ReplayedPrefix:
    """How to run a network, given a factor for the scales of each quantizer.

    Args:
        network: Calibrated network.
        calibration: Calibration set.
        quantizers: Quantizers whose scales change.
        first_layers: Position of the first layer, in the order of execution, that each is in.

    Example:
        See ``search_jointly``.
    """

    def __init__(
        self,
        network: QuantizedNetwork,
        calibration: CalibrationSet,
        quantizers: Sequence[Quantizer],
        first_layers: Sequence[int],
    ) -> None:
        self._network, self._calibration = network, calibration
        self._firsts = np.asarray(first_layers)
        self._layers = running_layers(network)
        self._store = ActivationStore(_BUDGET)
        self._stream: Replay | None = None
        self._works = True
        self._last = self._recorded = np.ones(len(quantizers))
        self._position = 0

    def run_at(self, factors: Any) -> Callable[[int], Any]:
        """How a batch goes through the network, whose scales have these factors already.

        Args:
            factors: Shape (quantizers,).
        """
        factors = np.array(factors)
        changed = self._firsts[factors != self._last]
        first = int(changed.min()) if len(changed) else self._position
        self._last = factors
        inside = self._firsts < self._position
        if not self._works or not np.array_equal(factors[inside], self._recorded[inside]):
            self.forget()
        if self._works and first > self._position:
            self._advance(first, factors)
        return self._run

    def _run(self, index: int) -> Any:
        if self._stream is not None and self._works:
            try:
                return self._stream.run(index)
            except CalledAgainError:
                self._works = False
        return self._calibration.run(index)

    def forget(self) -> None:
        """Free what is stored."""
        if self._stream is not None:
            self._stream.forget()
        self._stream, self._position = None, 0

    def close(self) -> None:
        """Free what is stored, and remove files."""
        self.forget()
        self._store.__exit__(None, None, None)

    def _advance(self, position: int, factors: Any) -> None:
        """Store the outputs of the layers before a position."""
        network = self._network
        assert network.structure is not None
        stream = self._stream
        if stream is None:
            stream = Replay(network.model, network.structure, self._calibration, self._layers, self._store, to_end=True)
        try:
            for name in self._layers[self._position : position]:
                outputs = stream.record(name).outputs
                assert outputs is not None
                stream.finish(name, outputs)
            self._works = _is_close(output_logits(stream.run(0)), output_logits(self._calibration.run(0)))
        except (CalledAgainError, NotReachedError):
            self._works = False
        self._stream, self._position, self._recorded = stream, position, factors
        if not self._works:
            log.info("The model cannot be replayed: it is measured by whole passes.")
            self.forget()


def running_layers(network: QuantizedNetwork) -> list[str]:
    """Names of the quantized layers that run, in the order of execution, none inside another, and no weights that are
    layers of their own.

    Args:
        network: Prepared network.

    Example:
        See ``search_jointly``.
    """
    assert network.structure is not None
    parts = {name for name, layer in network.layers.items() if layer.type.part}
    running = [name for name in network.structure.calls_of if name in network.layers and name not in parts]
    return [name for name in running if not any(name.startswith(f"{other}.") for other in running)]


def first_layer_of(network: QuantizedNetwork, quantizer: Quantizer) -> int:
    """Position of the first layer, in the order of execution, that has a quantizer; 0 where none is known.

    Args:
        network: Prepared network.
        quantizer: One of its quantizers.

    Example:
        See ``search_jointly``.
    """
    for position, name in enumerate(running_layers(network)):
        if any(each is quantizer for each in network.layers[name].quantizers):
            return position
    return 0


def _is_close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    with torch.no_grad():
        return all(
            given.shape == right.shape and float((given - right).norm()) <= _TOLERANCE * float(right.norm())
            for given, right in zip(found, wanted, strict=True)
        )
