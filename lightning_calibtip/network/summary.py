"""Status of each layer of a model, as lines of a table."""

from dataclasses import dataclass

from ..quantization.spec import LayerConfig, PerGroup
from .plan import NOTHING_QUANTIZED
from .quantization_plan import ModulePlan, QuantizationPlan


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
    return [_line(module) for module in plan.modules]


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
