"""What AdaQuant learns of a layer, and how fast."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..network.layers import QuantizedLayer
from ..quantization.quantizers import Quantizer
from .options import AdaQuantOptions
from .rounding import Rounding


class Rate(NamedTuple):
    """Learning rate of a parameter, or of each of its elements; a ``sparse`` one is updated at some steps only."""

    parameter: Tensor
    value: float | Tensor
    sparse: bool


def learning_rates(
    layer: QuantizedLayer,
    rounding: Rounding | None,
    quantizers: Sequence[Quantizer],
    options: AdaQuantOptions,
    output_error: float,
    learns_ratios: bool,
) -> list[Rate]:
    """What is learned of a layer, and how fast (see ``AdaQuantOptions.relative``).

    Args:
        layer: The layer.
        rounding: Rounding of its weight, if this is its own and quantized.
        quantizers: Quantizers of the layer that learn.
        options: Learning rates.
        output_error: Root mean square of its unit's output error, in the unit of the layer's output.
        learns_ratios: Whether the weights that read the input follow its ratios.
    """
    rate_scale = options.rate_scale
    rate_of = {"weight": rate_scale * options.weight_rate, "rounding": rate_scale * options.rounding_rate}
    rates = []
    if layer.bias is not None:
        scale = output_error if options.relative else 1
        rates.append(Rate(layer.bias, rate_scale * options.bias_rate * scale, False))
    for parameter, step, role in rounding.trainables() if rounding else ():
        rates.append(Rate(parameter, rate_of[role] * (step if options.relative else 1), False))
    for quantizer in quantizers:
        sparse = quantizer is not layer.weight_quantizer
        rate_of["scale"] = options.input_range_rate if sparse else options.weight_range_rate
        if not sparse and rounding is not None and not rounding.learns_scales:
            continue
        moves = sparse or rounding is None or rounding.learns_zero_points
        rate_of["zero_point"] = rate_scale * options.zero_point_rate if moves else 0.0
        rate_of["ratio"] = options.ratio_rate if learns_ratios else 0.0
        for learned in quantizer.trainables():
            moved = learned.step if options.relative else 1
            rates.append(Rate(learned.parameter, rate_of[learned.role] * moved, sparse))
    return [rate for rate in rates if bool(torch.as_tensor(rate.value).max() > 0)]
