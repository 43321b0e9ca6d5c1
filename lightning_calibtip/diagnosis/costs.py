"""What the weights and the inputs of each layer cost of the model's loss."""

from collections.abc import Callable
from dataclasses import dataclass

from .. import ranks
from ..calibration.activation_store import ActivationStore
from ..calibration.layer_by_layer import Run, owners_of, visit_layers
from ..calibration.losses import Loss
from ..calibration.progress import ProgressCallback, no_progress
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.parts import computing

# Of the loss, by the weight and by the inputs of a layer; None where these are in float anyway.
Changes = tuple[float | None, float | None]


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs of the model's loss, by itself and as part of the quantized model.

    Args:
        weight_alone: Rise of the loss over the float model's where only the layer's weight is quantized; None where it
            has no quantized weight of its own.
        inputs_alone: The same for its inputs (and its output, where it has a quantizer); None where these are in float.
        weight_left_float: Fall of the quantized model's loss where only this weight is left in float.
        inputs_left_float: The same for its inputs.

    Example:
        >>> LayerCost(weight_alone=0.5, inputs_alone=0.125, weight_left_float=0.25, inputs_left_float=0.125).share
        0.5
    """

    weight_alone: float | None
    inputs_alone: float | None
    weight_left_float: float | None
    inputs_left_float: float | None

    @property
    def share(self) -> float:
        """What the layer contributes to the quantized model's loss: the mean of what it costs alone and of what is
        gained without it, which is its Shapley value by the trapezoid rule."""
        parts = (self.weight_alone, self.inputs_alone, self.weight_left_float, self.inputs_left_float)
        return sum(filter(None, parts)) / 2


@dataclass(frozen=True)
class Costs:
    """What quantization costs of the loss, altogether and by layer.

    Args:
        float_loss: Loss of the float model; 0 for losses that compare with it.
        quantized_loss: Loss of the quantized model.
        layers: Cost of each layer by its name, in the order of execution.

    Example:
        See ``measure_costs``.
    """

    float_loss: float
    quantized_loss: float
    layers: dict[str, LayerCost]


def measure_costs(
    network: QuantizedNetwork,
    loss: Loss,
    store: ActivationStore | None = None,
    progress: ProgressCallback = no_progress,
) -> Costs:
    """Measure what each layer's weight and inputs cost: alone quantized in the float model, and alone left float in the
    quantized one.

    Both go through the model once, layer by layer, by replay (``visit_layers``). Of several ranks each measures its
    share of the layers.

    Args:
        network: Calibrated network with its float weights.
        loss: What is measured, and on which samples.
        store: Store of captured activations; all in memory if None.
        progress: Progress callback, called after each layer.

    Raises:
        RuntimeError: If the float weights are missing, since a checkpoint has not brought them along.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.calibration.calibration_set import CalibrationSet
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(8, 2))
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=2, activation_bits=None, edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> costs = measure_costs(network, Loss(network, calibration))
        >>> cost = costs.layers["0"]
        >>> cost.weight_alone == cost.weight_left_float == costs.quantized_loss, cost.inputs_alone
        (True, None)
    """
    float_loss, alone = _measure(network, loss, False, store, progress)
    quantized_loss, left = _measure(network, loss, True, store, progress)
    layers = {name: LayerCost(*alone[name], *left[name]) for name in network.layers}
    return Costs(float_loss, quantized_loss, layers)


def _measure(
    network: QuantizedNetwork, loss: Loss, quantized: bool, store: ActivationStore | None, progress: ProgressCallback
) -> tuple[float, dict[str, Changes]]:
    """Loss of the float or the quantized model, and its changes by each layer."""
    names, measured = list(network.layers), dict[str, Changes]()
    owners = owners_of(network, names)
    with network.quantized(quantized):
        total = loss()

        def visit(layer: QuantizedLayer, run: Run) -> None:
            if owners[layer.name] == ranks.rank():
                measured[layer.name] = _of_parts(layer, lambda: loss(run), quantized, total)
                progress(len(measured) + quantized * len(names), 2 * len(names), layer.name)

        visit_layers(network, loss, names, visit, store)
    return total, {name: changes for part in ranks.from_all(measured) for name, changes in part.items()}


def _of_parts(layer: QuantizedLayer, measure: Callable[[], float], quantized: bool, total: float) -> Changes:
    """Change of the loss by the weight and by the inputs: the rise in a float model, the fall in a quantized one."""
    has_inputs = any(quantizer is not None for quantizer in (*layer.input_quantizers, layer.output_quantizer))
    changes: list[float | None] = []
    for part, exists in (("weight", layer.weight_quantizer is not None), ("inputs", has_inputs)):
        if not exists:
            changes.append(None)
            continue
        weight = (part == "weight") != quantized
        with computing(layer, weight=weight, activations=not weight):
            changes.append((total - measure()) if quantized else (measure() - total))
    return changes[0], changes[1]
