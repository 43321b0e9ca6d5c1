"""A diagnosis: what each layer costs of the model's loss, why, and what can be done about it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..calibration.losses import Loss
from ..calibration.progress import ProgressCallback, no_progress
from ..network.network import QuantizedNetwork
from ..quantization.spec import BitWidths
from .causes import Cause, find_cause
from .costs import LayerCost, measure_costs
from .layer_statistics import LayerStatistics, layer_statistics
from .options import DiagnosisOptions
from .remedies import Remedy, remedies_for

# At most so many samples' values are looked at one by one.
_SAMPLES_OF_STATISTICS = 64


@dataclass(frozen=True)
class LayerFinding:
    """What was found of one layer.

    Args:
        name: Full name of the layer.
        type: Name of its class.
        bits: Its bit-widths.
        cost: What its weight and its inputs cost of the loss.
        statistics: What rounding does to its tensors.
        cause: Why it costs that.
        remedies: What can be done, the cheapest first; none where the layer takes no share of the loss.

    Example:
        See ``diagnose``.
    """

    name: str
    type: str
    bits: BitWidths
    cost: LayerCost
    statistics: LayerStatistics
    cause: Cause
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True)
class AppliedRemedy:
    """A remedy that was applied.

    Args:
        code: How the user writes it.
        loss: Loss of the quantized model with it and those before.
        metric: The user's metric then; None where it was not asked for.
        bytes: Bytes of weights that it costs.

    Example:
        See ``apply_remedies``.
    """

    code: str
    loss: float
    metric: float | None
    bytes: int


@dataclass(frozen=True)
class DiagnosisResult:
    """Outcome of a diagnosis.

    Args:
        loss: Name of the loss.
        samples: Number of samples that it was measured on.
        float_loss: Loss of the float model.
        quantized_loss: Loss of the quantized model, before any remedy.
        layers: What was found of each layer, in the order of execution.
        applied: Remedies that were applied, in order.
        outcome: What became of applying remedies; ``""`` if none were to be applied.

    Example:
        See ``diagnose``.
    """

    loss: str
    samples: int
    float_loss: float
    quantized_loss: float
    layers: tuple[LayerFinding, ...]
    applied: Sequence[AppliedRemedy] = field(default_factory=tuple)
    outcome: str = ""

    def worst(self, count: int | None = None) -> list[LayerFinding]:
        """The layers that cost most, the worst first.

        Args:
            count: How many; all if None.
        """
        return sorted(self.layers, key=lambda layer: layer.cost.share, reverse=True)[:count]


def diagnose(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    options: DiagnosisOptions | None = None,
    store: ActivationStore | None = None,
    progress: ProgressCallback = no_progress,
) -> DiagnosisResult:
    """Find out what each layer costs of the model's loss, why, and what can be done about it.

    The model is not changed.

    Args:
        network: Calibrated network with its float weights.
        calibration: Calibration set.
        options: See ``DiagnosisOptions``; remedies are not applied here, see ``apply_remedies``.
        store: Store of captured activations; all in memory if None.
        progress: Progress callback, called for each layer.

    Raises:
        RuntimeError: If the model is not calibrated, or its float weights are missing.
        TypeError: If the loss compares logits and the model's output has none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(64, 16) * torch.tensor([50.0] + [1.0] * 15))
        >>> network = QuantizedNetwork(model, QuantizationScheme(activation_bits=4, edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> worst = diagnose(network, calibration).worst(1)[0]
        >>> worst.name, worst.cause.name, worst.remedies[0].code
        ('0', 'outlier channel', 'Equalization()')
    """
    options = options or DiagnosisOptions()
    if not network.calibrated:
        raise RuntimeError("A diagnosis looks at a quantized model: run Calibration first.")
    calibration.require()
    loss = Loss(network, calibration, options.loss, options.samples_of(calibration.samples))
    costs = measure_costs(network, loss, store, progress)
    statistics = layer_statistics(network, calibration, min(_SAMPLES_OF_STATISTICS, loss.calibration.samples))
    types = {line.name: line.type for line in network.summary()}
    findings = []
    for name, cost in costs.layers.items():
        layer = network.layers[name]
        of_weight = _costs_more(cost)
        cause = find_cause(statistics[name], of_weight, layer.bias is not None)
        # Where nothing is lost there is nothing to mend.
        remedies = tuple(remedies_for(network, layer, cause, of_weight)) if cost.share > 0 else ()
        bits = layer.config.bit_widths
        findings.append(LayerFinding(name, types[name], bits, cost, statistics[name], cause, remedies))
    return DiagnosisResult(loss.name, loss.calibration.samples, costs.float_loss, costs.quantized_loss, tuple(findings))


def _costs_more(cost: LayerCost) -> bool:
    """Whether the weight costs more than the inputs, in the quantized model and alone."""
    weight = sum(filter(None, (cost.weight_left_float, cost.weight_alone)))
    inputs = sum(filter(None, (cost.inputs_left_float, cost.inputs_alone)))
    return cost.weight_alone is not None and (cost.inputs_alone is None or weight >= inputs)
