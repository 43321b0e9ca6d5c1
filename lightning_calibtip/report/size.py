"""Size of a model in bytes, float and quantized."""

from dataclasses import dataclass

from torch import nn

from ..network.folding import FoldedBatchNorm
from ..network.network import QuantizedNetwork


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
