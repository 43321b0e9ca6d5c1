"""What each layer costs at each candidate bit-width: tables for the integer program, one function a cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..calibration.calibration_set import CalibrationSet
from ..network.layer_types import layer_type_of
from ..network.network import QuantizedNetwork
from ..quantization.spec import FLOAT_BITS, BitWidths, LayerConfig
from .latency import LatencyTable, latencies
from .work import Work, measure_work

CostTable = dict[str, dict[BitWidths, float]]
CostFunction = Callable[["CostInputs"], CostTable]

# By name, in the order in which messages list them.
_COSTS: dict[str, CostFunction] = {}


def register_cost(name: str) -> Callable[[CostFunction], CostFunction]:
    """Register a cost of the integer program, which can then be a budget (``AllocationOptions.budgets``) and be
    minimised.

    Args:
        name: Name of the cost, other than ``"loss"``.

    Returns:
        Decorator for a function that gives the cost of every layer in ``CostInputs.options`` at each of its
        bit-widths, in any unit; costs of layers are added up.

    Raises:
        ValueError: If the name is ``"loss"``.

    Example:
        >>> @register_cost("weight_passes")
        ... def weight_passes(inputs):
        ...     '''A unit whose multipliers take 4 bits of the weight at a time.'''
        ...     def passes(name, config):
        ...         bits = config.bit_widths.weight or 32
        ...         return inputs.work[name].multiply_accumulates * math.ceil(bits / 4)
        ...     return inputs.tabulate(passes)
        >>> "weight_passes" in cost_names()
        True
    """
    if name == "loss":
        raise ValueError('A cost cannot be named "loss", which is what sensitivities measure: choose another name.')

    def register(function: CostFunction) -> CostFunction:
        _COSTS[name] = function
        return function

    return register


def cost_names() -> list[str]:
    """Names of all registered costs.

    Example:
        >>> cost_names()[:2]
        ['compression', 'weight_bytes']
    """
    return list(_COSTS)


@dataclass(frozen=True)
class CostInputs:
    """What a cost may depend on.

    Args:
        network: The model, which knows its layers and their numbers of weights.
        calibration: Calibration set, of which one batch is run if a cost asks for ``work``.
        options: Bit-widths that each quantizable layer may have, by its name: the candidates, those that a pinned layer
            has, or ``BitWidths(None, None)`` of a layer that stays in float.
        latency_table: The user's table of latencies; None if there is none.
        known_work: What each layer does for one sample, where it was measured before; None to measure it.

    Example:
        See ``bit_operations``, and ``register_cost`` for a cost of one's own.
    """

    network: QuantizedNetwork
    calibration: CalibrationSet
    options: Mapping[str, Sequence[BitWidths]]
    latency_table: LatencyTable | None = None
    known_work: Mapping[str, Work] | None = None

    @cached_property
    def configs(self) -> dict[str, dict[BitWidths, LayerConfig]]:
        """Format of each layer at each of its bit-widths; a layer without a weight, say, has none for it at any."""
        return {name: {bits: self._config(name, bits) for bits in options} for name, options in self.options.items()}

    def _config(self, name: str, bits: BitWidths) -> LayerConfig:
        if name not in self.network.layers:
            return LayerConfig()
        layer = self.network.layers[name]
        # That of a pinned layer need not follow from its bit-widths alone.
        is_present = bits == layer.config.bit_widths
        return layer.config if is_present else self.network.config_for(name, bits)

    @cached_property
    def work(self) -> Mapping[str, Work]:
        """What each layer does for one sample; measured when it is first asked for."""
        return measure_work(self.network, self.calibration) if self.known_work is None else self.known_work

    def has_weight(self, name: str) -> bool:
        """Whether a layer's type has a weight; a matrix product has none."""
        layer_type = layer_type_of(self.network.model.get_submodule(name))
        return layer_type is None or layer_type.channel_axis is not None

    def tabulate(self, cost: Callable[[str, LayerConfig], float]) -> CostTable:
        """Table of a cost that depends on a layer and its format.

        Args:
            cost: ``cost(name, config)`` gives the cost of a layer in a format.
        """
        return {
            name: {bits: cost(name, config) for bits, config in configs.items()}
            for name, configs in self.configs.items()
        }


def open_candidates(network: QuantizedNetwork, candidates: Sequence[BitWidths]) -> dict[str, list[BitWidths]]:
    """List the bit-widths that each quantizable layer may have.

    Args:
        network: Network that has been prepared.
        candidates: Candidates of the searchable layers.

    Returns:
        For each layer by name: the candidates if it is searchable, those that it has if it is pinned, and
        ``BitWidths(None, None)`` if it stays in float.

    Example:
        See ``bit_operations``.
    """
    searchable = set(network.searchable_layers)
    options = {
        name: list(candidates) if name in searchable else [layer.config.bit_widths]
        for name, layer in network.layers.items()
    }
    return {**options, **{name: [BitWidths(None, None)] for name in network.float_layers}}


def cost_table(name: str, inputs: CostInputs) -> CostTable:
    """Compute a registered cost and check that it is complete.

    Args:
        name: Name of the cost.
        inputs: What it may depend on.

    Raises:
        ValueError: If a layer or one of its bit-widths is missing, or a cost is not a finite number; the message names
            the cost, the layer and the bit-widths.

    Example:
        See ``bit_operations``.
    """
    table = _COSTS[name](inputs)
    for layer, options in inputs.options.items():
        for bits in options:
            value = table.get(layer, {}).get(bits)
            if value is None or not math.isfinite(value):
                raise ValueError(
                    f"The cost {name!r} of {layer} at {bits.label} is {value}: the function registered for it must "
                    "return a finite number for each layer and each of its bit-widths in CostInputs.options."
                )
    return {layer: {bits: float(table[layer][bits]) for bits in options} for layer, options in inputs.options.items()}


@register_cost("compression")
def compression(inputs: CostInputs) -> CostTable:
    """Bits of each layer's weights over those of all quantizable weights as float32: their sum is the paper's
    compression.

    Scales and zero points, of channels or of groups, are not counted.

    Example:
        See ``bit_operations``, whose signature it shares.
    """
    weights = {name: inputs.network.weights_of(name) for name in inputs.options}
    whole = FLOAT_BITS * sum(weights.values()) or 1
    return inputs.tabulate(lambda name, config: weights[name] * _bits(config.bit_widths.weight) / whole)


@register_cost("weight_bytes")
def weight_bytes(inputs: CostInputs) -> CostTable:
    """Bytes of each layer's weights, without scales and zero points.

    Example:
        See ``bit_operations``, whose signature it shares.
    """
    return inputs.tabulate(lambda name, config: inputs.network.weights_of(name) * _bits(config.bit_widths.weight) / 8)


@register_cost("bit_operations")
def bit_operations(inputs: CostInputs) -> CostTable:
    """Bit operations (BOPs) for one sample: multiply-accumulates times bits of the weight times bits of the input.

    In a matrix product, which has no weight, the factors are the bits of its two inputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.ones(4, 2))
        >>> network = QuantizedNetwork(model, QuantizationScheme(edge_bits=None))
        >>> network.prepare(lambda: calibration.run(0))
        >>> options = open_candidates(network, [BitWidths(4, 8), BitWidths(4, None)])
        >>> table = cost_table("bit_operations", CostInputs(network, calibration, options))
        >>> {bits.label: cost for bits, cost in table["0"].items()}
        {'W4A8': 192.0, 'W4': 768.0}
    """

    def operations(name: str, config: LayerConfig) -> float:
        first, second = config.bit_widths.weight, config.bit_widths.activation
        if not inputs.has_weight(name):
            factors = [None if spec is None else spec.bits for spec in config.inputs] or [None]
            first, second = (*factors, *factors)[:2]
        return inputs.work[name].multiply_accumulates * _bits(first) * _bits(second)

    return inputs.tabulate(operations)


@register_cost("activation_bytes")
def activation_bytes(inputs: CostInputs) -> CostTable:
    """Bytes of each layer's inputs for one sample; their sum is what all inputs take together.

    Example:
        See ``bit_operations``, whose signature it shares.
    """
    return inputs.tabulate(
        lambda name, config: inputs.work[name].input_elements * _bits(config.bit_widths.activation) / 8
    )


@register_cost("latency")
def latency(inputs: CostInputs) -> CostTable:
    """Latency of each layer by the user's table, see ``latencies``.

    Example:
        See ``bit_operations``, whose signature it shares.
    """
    if inputs.latency_table is None:
        raise ValueError("latency needs a latency_table: layer -> bit-widths -> latency.")
    return latencies(inputs.latency_table, inputs.network, inputs.options)


def _bits(bits: int | None) -> int:
    return FLOAT_BITS if bits is None else bits
