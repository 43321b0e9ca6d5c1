"""Remedies: what can be done about a layer's loss, written as a stage, an option of the scheme, or an override."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..calibration.activation_store import ActivationStore
from ..calibration.calibration_set import CalibrationSet
from ..network.layers import QuantizedLayer
from ..network.network import QuantizedNetwork
from ..network.scheme import QuantizationScheme
from ..quantization.spec import BitWidths, PerChannel, PerTensor
from ..reconstruction.equalizable import equalizable_inputs, may_divide
from ..reconstruction.equalize import equalize
from ..tuning.batch_norm import tune_batch_norm
from ..tuning.bias import tune_bias
from .causes import (
    BIASED_MEAN,
    CLIPPED_TAIL,
    DEAD_RANGE,
    FEW_LEVELS,
    OUTLIER_CHANNEL,
    OUTLIER_TOKEN,
    Cause,
)

# Bit-width that an override raises a layer to; every engine runs it.
WIDE = 8


@dataclass(frozen=True)
class Remedy:
    """Something that can be done about the loss of a layer.

    Args:
        code: How the user writes it: ``"Equalization()"``, ``"overrides={'fc': (8, 8)}"``.
        layer: Layer whose bit-widths it raises; None for what acts on the whole model.
        bits: These bit-widths; None for no such remedy.
        act: Function that applies it to a calibrated network; None for what needs a new calibration, or a longer run.

    Example:
        See ``remedies_for``.
    """

    code: str
    layer: str | None = None
    bits: BitWidths | None = None
    act: Callable[[QuantizedNetwork, CalibrationSet, ActivationStore], object] | None = None

    @property
    def applicable(self) -> bool:
        """Whether it can be applied to a network that is calibrated already."""
        return self.bits is not None or self.act is not None


def _equalize(network: QuantizedNetwork, calibration: CalibrationSet, store: ActivationStore) -> object:
    return equalize(network, calibration, None, store)


def _tune_batch_norm(network: QuantizedNetwork, calibration: CalibrationSet, store: ActivationStore) -> object:
    return tune_batch_norm(network, calibration, None, store)


def _tune_bias(network: QuantizedNetwork, calibration: CalibrationSet, store: ActivationStore) -> object:
    return tune_bias(network, calibration)


def remedies_for(network: QuantizedNetwork, layer: QuantizedLayer, cause: Cause, of_weight: bool) -> list[Remedy]:
    """Remedies for a layer, the cheapest first: what the cause asks for where it is possible, and more bits.

    Args:
        network: Calibrated network.
        layer: The layer.
        cause: What was found of it.
        of_weight: Whether its weight costs more than its inputs.

    Returns:
        At least one remedy, unless all is in more than 8 bits already and an engine forbids float layers.

    Example:
        See ``diagnose``.
    """
    scheme = network.scheme
    reconstructed = any(other.errors is not None for other in network.layers.values())
    found: list[Remedy] = []
    if cause.name == BIASED_MEAN:
        # After a reconstruction it would blow up again what has less variance than its target.
        if layer.name in {fold.layer for fold in network.plan.folds} and not reconstructed:
            found.append(Remedy("BatchNormTuning()", act=_tune_batch_norm))
        found.append(Remedy("BiasTuning()", act=_tune_bias))
    elif cause.part == "inputs":
        found += _for_inputs(network, layer, cause, reconstructed)
    elif cause.part == "weight":
        found += _for_weight(scheme, layer, cause)
    if not reconstructed and not found and layer.has_weight:
        found.append(Remedy("AdaQuant()"))
    return [*found, *wider(network, layer, of_weight)]


def _for_inputs(network: QuantizedNetwork, layer: QuantizedLayer, cause: Cause, reconstructed: bool) -> list[Remedy]:
    if cause.name == OUTLIER_CHANNEL and layer.input_ratio is None:
        for tensor, readers, _ in equalizable_inputs(network):
            if tensor in layer.tensors and may_divide(network, readers, None):
                # It would choose the ranges of reconstructed weights anew.
                return [Remedy("Equalization()", act=None if reconstructed else _equalize)]
    dynamic = any(spec is not None and spec.dynamic for spec in layer.config.inputs)
    spans_tokens = any(operand.dynamic_range_axes for operand in layer.type.operands)
    if (
        cause.name in (OUTLIER_TOKEN, OUTLIER_CHANNEL)
        and spans_tokens
        and not dynamic
        and network.scheme.engine is None
    ):
        return [Remedy("per_token=True")]
    if cause.name in (CLIPPED_TAIL, DEAD_RANGE) and layer.range_options.observer != "mse":
        return [Remedy('Calibration(observer="mse")')]
    return []


def _for_weight(scheme: QuantizationScheme, layer: QuantizedLayer, cause: Cause) -> list[Remedy]:
    granularity = layer.config.weight.granularity if layer.config.weight is not None else None
    if isinstance(granularity, PerTensor):
        return [Remedy("per_channel=True")]
    if cause.name in (CLIPPED_TAIL, DEAD_RANGE) and layer.range_options.weight_observer != "mse":
        return [Remedy('Calibration(weight_observer="mse")')]
    may_group = scheme.engine is None or scheme.engine.groups
    if cause.name == FEW_LEVELS and isinstance(granularity, PerChannel) and may_group:
        return [Remedy("group_size=32")]
    return []


def wider(network: QuantizedNetwork, layer: QuantizedLayer, of_weight: bool) -> list[Remedy]:
    """Overrides that give a layer more bits: 8 for what costs, then for all of it, then float.

    Args:
        network: Calibrated network.
        layer: The layer.
        of_weight: Whether its weight costs more than its inputs.

    Example:
        See ``remedies_for``.
    """
    present, engine = layer.config.bit_widths, network.scheme.engine
    if layer.tied_to is not None:
        present = BitWidths(layer.tied_to.config.bit_widths.weight, present.activation)
    weight = None if present.weight is None else max(present.weight, WIDE)
    activation = None if present.activation is None else max(present.activation, WIDE)
    first = BitWidths(weight, present.activation) if of_weight else BitWidths(present.weight, activation)
    candidates = [bits for bits in dict.fromkeys((first, BitWidths(weight, activation))) if bits != present]
    if candidates:
        return [Remedy(_override(layer.name, bits), layer.name, bits) for bits in candidates]
    if engine is not None and not engine.float_layers:
        return []
    return [Remedy(f"overrides={{{layer.name!r}: None}}")]


def _override(name: str, bits: BitWidths) -> str:
    return f"overrides={{{name!r}: ({bits.weight}, {bits.activation})}}"


def distinct(remedies: Sequence[Remedy]) -> list[Remedy]:
    """The remedies without those that are written alike.

    Example:
        >>> [remedy.code for remedy in distinct([Remedy("Equalization()"), Remedy("Equalization()")])]
        ['Equalization()']
    """
    return list({remedy.code: remedy for remedy in remedies}.values())
