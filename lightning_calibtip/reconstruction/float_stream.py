"""The float stream of reconstruction: what the float model gives for each unit, shared by all that is made of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.recording import Recording, UnitCall
from ..calibration.replay import NotReachedError, Replay
from ..network.network import QuantizedNetwork
from .importance import measure_importance, token_weights
from .objectives import make_objective, weighs_rows
from .options import AdaQuantOptions
from .units import Unit


class FloatRecord(NamedTuple):
    """What the float model gives for one unit.

    Args:
        inputs: Its inputs, if they are kept.
        targets: Its outputs.
        weights: Importance of the elements of its outputs, if they are not all alike.
        shapes: Shapes of its inputs, call by call.

    Example:
        See ``FloatStream``.
    """

    inputs: Recording | None
    targets: Recording
    weights: Recording | None
    shapes: list[list[torch.Size]]


class FloatStream:
    """The float model's inputs, outputs and importance of outputs, unit by unit.

    Args:
        network: Calibrated network.
        calibration: Calibration set.
        options: Options with the loss that weights outputs, if there is one.
        units: Units that will be asked for, in this order.
        store: Store of the activations.

    Example:
        See ``adaquant``, which takes its targets from it.
    """

    def __init__(
        self,
        network: QuantizedNetwork,
        calibration: CalibrationSet,
        options: AdaQuantOptions,
        units: Sequence[Unit],
        store: ActivationStore,
    ) -> None:
        assert network.structure is not None
        names = [unit.name for unit in units]
        self._network, self._calibration = network, calibration
        self._stream = Replay(network.model, network.structure, calibration, names, store)
        self._importance: dict[str, Recording] = {}
        if options.loss is not None:
            given = options.loss, options.seed
            self._importance = measure_importance(network, calibration, units, self._stream, *given)
        self._objective = options.objective_in_use
        self._weighs = options.loss is not None or calibration.padded or weighs_rows(self._objective)

    def record(self, unit: Unit, keep_inputs: bool, weighs: bool = True) -> FloatRecord:
        """Run the float unit at all its calls.

        Args:
            unit: The next unit.
            keep_inputs: Whether its inputs will be wanted.
            weighs: Whether the importance of its outputs will be wanted.

        Raises:
            NotReachedError: If a batch does not reach the unit.
        """
        stream, channels_last = self._stream, unit.prefers_channels_last
        importance = self._importance.pop(unit.name, None)
        weights = stream.recording(unit.name, channels_last) if self._weighs and weighs else None
        objective = make_objective(self._objective, unit.layers)
        position = iter(range(stream.calls(unit.name) * len(self._calibration)))
        shapes: list[list[torch.Size]] = []

        def weigh(index: int, call: UnitCall, output: Any) -> None:
            # Of those that a recording keeps.
            leaves = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
            shapes.append([leaf.shape for leaf in leaves])
            if weights is not None:
                given = None if importance is None else importance[next(position)]
                weights.append(token_weights(unit, output, self._calibration.tokens(index), given, objective))

        try:
            with self._network.quantized(False):
                inputs, outputs = stream.record(unit.name, keep_inputs, True, channels_last, weigh)
        except NotReachedError:
            if weights is not None:
                weights.forget()
            raise
        finally:
            if importance is not None:
                importance.forget()
        assert outputs is not None
        return FloatRecord(inputs, outputs, weights, shapes)

    def finish(self, unit: Unit, record: FloatRecord) -> None:
        """Go on to the next unit; what was recorded for this one is freed."""
        self._stream.finish(unit.name, record.targets)
        for recording in (record.inputs, record.weights):
            if recording is not None:
                recording.forget()

    def forget(self) -> None:
        """Free everything, at the end."""
        self._stream.forget()
