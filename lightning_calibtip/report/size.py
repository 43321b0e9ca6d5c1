"""Size of a model in bytes, and its bit operations: float and quantized."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..allocation.costs import CostInputs, cost_table
from ..allocation.work import Work
from ..calibration.calibration_set import CalibrationSet
from ..network.folding import FoldedBatchNorm
from ..network.network import QuantizedNetwork
from ..quantization.spec import FLOAT_BITS, BitWidths


@dataclass(frozen=True)
class ModelSize:
    """Size of a model.

    Args:
        float_bytes: Bytes of the float model's parameters and buffers.
        quantized_bytes: Bytes of the quantized model.

    Example:
        >>> ModelSize(float_bytes=400, quantized_bytes=100).ratio
        0.25
    """

    float_bytes: int
    quantized_bytes: int

    @property
    def ratio(self) -> float:
        """Quantized over float."""
        return self.quantized_bytes / self.float_bytes if self.float_bytes else 1.0


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once.

    Example:
        >>> tensor_bytes(nn.Linear(2, 3))
        36
    """
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def model_size(network: QuantizedNetwork) -> ModelSize:
    """Size of what inference needs: weights at their bit-widths, what an engine must store of each quantizer, and
    whatever stays in float. The memory of folded BatchNorms, which only re-tuning needs, does not count.

    Args:
        network: The network, with its present formats.

    Example:
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model_size(QuantizedNetwork(nn.Sequential(nn.Linear(2, 3)), QuantizationScheme()))
        ModelSize(float_bytes=36, quantized_bytes=36)
    """
    total = tensor_bytes(network.model)
    for module in network.model.modules():
        if isinstance(module, FoldedBatchNorm):
            total -= sum(buffer.nbytes for buffer in module.buffers(recurse=False))
    # A quantizer that several layers share is stored once.
    for quantizer in network.quantizers:
        total += quantizer.parameter_bytes() - tensor_bytes(quantizer)
    for layer in network.layers.values():
        if layer.weight_quantizer is not None:
            weight, bits = layer.weight, layer.weight_quantizer.spec.bits
            total += (weight.numel() * bits + 7) // 8 - weight.nbytes
    return ModelSize(network.float_bytes, total)


@dataclass(frozen=True)
class BitOperations:
    """Bit operations (BOPs) of a model for one sample: multiply-accumulates times the bits of both factors.

    Args:
        float_operations: Those of the float model, with 32 bits.
        quantized_operations: Those of the quantized model.

    Example:
        >>> BitOperations(float_operations=1024.0, quantized_operations=64.0).ratio
        0.0625
    """

    float_operations: float
    quantized_operations: float

    @property
    def ratio(self) -> float:
        """Quantized over float."""
        return self.quantized_operations / self.float_operations if self.float_operations else 1.0


def bit_operations(network: QuantizedNetwork, work: Mapping[str, Work]) -> BitOperations:
    """Bit operations of all quantizable layers, those that stay in float included.

    Args:
        network: The network, with its present formats.
        work: What each layer does for one sample, see ``measure_work``.

    Example:
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=4, activation_bits=8, edge_bits=None))
        >>> import torch
        >>> network.prepare(lambda: model(torch.ones(1, 2)))
        >>> bit_operations(network, {"0": Work(6.0, 2.0)})
        BitOperations(float_operations=6144.0, quantized_operations=192.0)
    """
    present = {name: [layer.config.bit_widths] for name, layer in network.layers.items()}
    present |= {name: [BitWidths(None, None)] for name in network.float_layers}
    # What was measured before needs no calibration set.
    nothing = CalibrationSet(lambda batch, index: None)
    costs = cost_table("bit_operations", CostInputs(network, nothing, present, known_work=work))
    whole = sum(work[name].multiply_accumulates for name in present) * FLOAT_BITS**2
    return BitOperations(whole, sum(cost for of_layer in costs.values() for cost in of_layer.values()))
