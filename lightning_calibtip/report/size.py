"""Size of a model in bytes, float and quantized."""

from dataclasses import dataclass

from torch import nn

from ..quantization.folding import FoldedBatchNorm
from ..quantization.network import QuantizedNetwork


@dataclass(frozen=True)
class ModelSize:
    """Bytes of the float model (parameters and buffers) and of the quantized one."""

    float_bytes: int
    quantized_bytes: int

    @property
    def ratio(self) -> float:
        """Quantized over float."""
        return self.quantized_bytes / self.float_bytes if self.float_bytes else 1.0


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def model_size(network: QuantizedNetwork) -> ModelSize:
    """Size of what inference needs: weights at their bits, scales and (but for symmetric weights) zero points at 4
    bytes
    each, and
    whatever stays float. The memory of folded BatchNorms, which only re-tuning needs, does not count.
    """
    total = tensor_bytes(network.model)
    for module in network.model.modules():
        if isinstance(module, FoldedBatchNorm):
            total -= tensor_bytes(module)
    for layer in network.layers.values():
        total += (layer.weight.numel() * layer.bits[0] + 7) // 8 - layer.weight.nbytes
        for quantizer in layer.quantizers:
            if quantizer.dynamic or (quantizer.symmetric and not quantizer.one_sided) or quantizer.operand.unsigned:
                total -= quantizer.zero_point.nbytes
            if quantizer.dynamic:
                total -= quantizer.scale.nbytes
    return ModelSize(network.float_bytes, total)
