"""Status of each layer of a model, as lines of a table."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..quantization.spec import LayerConfig, PerGroup
from .plan import NOTHING_QUANTIZED
from .quantization_plan import ModulePlan, QuantizationPlan
from .scheme import QuantizationScheme

log = logging.getLogger(__name__)

# How many names of layers stand for all of a kind.
_NAMED = 3


@dataclass(frozen=True)
class LayerSummary:
    """One line of the summary table.

    Args:
        name: Full name of the module; ``""`` for the model itself.
        type: Name of its class.
        kind: ``"quantized"``, ``"folded"`` or ``"float"``.
        weight_bits: Bit-width of the weight; None where it is in float, or there is none.
        activation_bits: Bit-width of the inputs; None where they are in float.
        parameters: Number of weights of what is quantized, of all own parameters of what is not.
        note: Why it stays in float, or what else was done to it.

    Example:
        See ``summarize``.
    """

    name: str
    type: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    parameters: int
    note: str


def summarize(plan: QuantizationPlan) -> list[LayerSummary]:
    """Status of each layer, each BatchNorm and each other matrix product, in the order of execution.

    Example:
        >>> from lightning_calibtip.network.quantization_plan import ModulePlan
        >>> [line.note for line in summarize(QuantizationPlan((ModulePlan("bn", "BatchNorm1d", "normalization",
        ...                                                               folded_into="fc"),)))]
        ['into fc']
    """
    return [_with_bits_of_owner(_line(module), plan) for module in plan.modules]


def _with_bits_of_owner(line: LayerSummary, plan: QuantizationPlan) -> LayerSummary:
    """A layer that is tied to another one's weight has it at the bits of that one, whatever was asked for itself."""
    owner = plan.layers.get(plan.tied.get(line.name, ""))
    if line.kind != "quantized" or owner is None or owner.config is None:
        return line
    return replace(line, weight_bits=owner.config.bit_widths.weight)


def _line(module: ModulePlan) -> LayerSummary:
    if module.config is not None and module.config.is_float:
        return LayerSummary(module.name, module.type, "float", None, None, module.parameters, NOTHING_QUANTIZED)
    if module.config is not None:
        bits = module.config.bit_widths
        note = "; ".join(filter(None, (module.reason, _format(module.config))))
        return LayerSummary(
            module.name, module.type, "quantized", bits.weight, bits.activation, module.parameters, note
        )
    if module.folded_into is not None:
        note = f"into {module.folded_into}"
        return LayerSummary(module.name, module.type, "folded", None, None, 0, note)
    return LayerSummary(module.name, module.type, "float", None, None, module.parameters, module.reason)


def _format(config: LayerConfig) -> str:
    """What the bit-widths do not tell of a format."""
    parts = []
    if config.weight is not None and isinstance(config.weight.granularity, PerGroup):
        parts.append(f"weights in groups of {config.weight.granularity.size}")
    if any(spec is not None and spec.equalized for spec in config.inputs):
        parts.append("channels of the input equalized")
    if config.output is not None:
        parts.append(f"output at {config.output.bits} bits")
    return ", ".join(parts)


def float_kinds(lines: Iterable[LayerSummary]) -> list[str]:
    """What stays float, one line for each kind: how many of a type, why, and the first of their names.

    Args:
        lines: Lines of the summary.

    Example:
        >>> norm = "not a quantizable type of layer"
        >>> float_kinds(LayerSummary(f"norm{i}", "LayerNorm", "float", None, None, 8, norm) for i in range(4))
        ['float: 4 LayerNorm (not a quantizable type of layer): norm0, norm1, norm2, ...']
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line.kind == "float":
            kinds.setdefault((line.type, line.note), []).append(line.name)
    return [f"float: {len(names)} {kind} ({note}): {_some(names)}" for (kind, note), names in kinds.items()]


def warn_of_float(plan: QuantizationPlan, scheme: QuantizationScheme) -> None:
    """Log what stays float although it might have been quantized, one warning for each reason.

    Args:
        plan: The plan.
        scheme: The user's scheme, whose overrides need no warning.

    Example:
        See ``QuantizedNetwork``, which warns of its plan.
    """
    for reason, names in _by_reason(plan.unfolded_norms).items():
        one, several = f"BatchNorm {names[0]} is not folded", f"{len(names)} BatchNorms are not folded"
        log.warning("%s: %s.", _subject(one, several, names), reason)
    warn_of_modules(plan.float_matmuls)
    warn_of_layers(
        {
            name: reason
            for name, reason in plan.float_layers.items()
            if not scheme.is_overridden(name) and reason != NOTHING_QUANTIZED
        }
    )


def warn_of_modules(reasons: Mapping[str, str]) -> None:
    """Log which modules compute products in float, one warning for each reason.

    Args:
        reasons: What each does, by its name: ``"computes bmm"``.

    Example:
        >>> warn_of_modules({})
    """
    for reason, names in _by_reason(reasons).items():
        if len(names) == 1:
            log.warning("%s %s: that stays float.", names[0] or "The model itself", reason)
        else:
            log.warning("%d modules (%s), each of which %s: that stays float.", len(names), _some(names), reason)


def warn_of_layers(layers: Mapping[str, str]) -> None:
    """Log which layers stay float, one warning for each reason.

    Args:
        layers: Why each does, by its name.

    Example:
        >>> warn_of_layers({})
    """
    for reason, names in _by_reason(layers).items():
        one, several = f"Layer {names[0]} stays float", f"{len(names)} layers stay float"
        log.warning("%s: %s.", _subject(one, several, names), reason)


def _subject(one: str, several: str, names: Sequence[str]) -> str:
    return one if len(names) == 1 else f"{several} ({_some(names)})"


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found


def _some(names: Sequence[str]) -> str:
    named = [name or "the model itself" for name in names[:_NAMED]]
    return ", ".join([*named, *(["..."] if len(names) > _NAMED else [])])
