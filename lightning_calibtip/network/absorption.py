"""Which module can take in the ratios of an equalized tensor, so that no engine has to divide its channels."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..quantization.spec import PerChannel, PerGroup
from .layers import QuantizedLayer
from .structure import ModuleCall, Structure, Value
from .tensors import ObservedTensor

# A positive factor of a channel passes these unchanged, and so do channels themselves.
_HOMOGENEOUS = {"relu", "leaky_relu", "clone", "contiguous"}
# So do maxima over these many last dimensions, if channels are not among them.
_MAXIMA = {"max_pool1d": 1, "max_pool2d": 2, "max_pool2d_with_indices": 2}

# Layers that return their sums of products as they are.
_FORWARDS = {layer.forward for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def find_absorbers(
    model: nn.Module, structure: Structure, layers: Mapping[str, QuantizedLayer]
) -> dict[ObservedTensor, str]:
    """The tensors whose channels are scaled by the module that writes them, and nothing else reads what it writes.

    Such a module is a layer with scales for each output channel (its integers stay as they are: the scales and the
    bias are divided), or a normalization with weights for each channel, if ReLU and maxima alone stand between.

    Args:
        model: The model.
        structure: As observed of the float model.
        layers: The quantized layers.

    Returns:
        Name of the module by tensor.

    Example:
        >>> import torch
        >>> from lightning_calibtip.network.network import QuantizedNetwork
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> network = QuantizedNetwork(model, QuantizationScheme())
        >>> network.prepare(lambda: model(torch.ones(1, 2)))
        >>> {tensor.name: name for tensor, name in find_absorbers(model, network.structure, network.layers).items()}
        {'2 input': '0'}
    """
    found: dict[ObservedTensor, str] = {}
    modules = dict(model.named_modules())
    for name, calls in structure.calls_of.items():
        axis = _output_axis(name, modules, layers)
        if axis is None or len(calls) != 1 or len(calls[0].writes) != 1:
            continue
        readers = _only_readers(structure, calls[0], layers, axis)
        tensors = {layers[reader].tensors[0] for reader in readers}
        if len(tensors) != 1:
            continue
        (tensor,) = tensors
        same_axis = all(layers[reader].type.operands[0].channel_axis == axis for reader in readers)
        once = all(len(structure.calls_of[reader]) == 1 for reader in readers)
        if same_axis and once and set(tensor.readers) == set(readers):
            found[tensor] = name
    return found


def _output_axis(name: str, modules: Mapping[str, Any], layers: Mapping[str, QuantizedLayer]) -> int | None:
    """Dimension of a module's output, counted from the last, whose channels it can scale; None if it cannot."""
    if name in layers:
        layer = layers[name]
        weight = layer.config.weight
        scales = (PerChannel, PerGroup)
        is_scaled = weight is None or (
            isinstance(weight.granularity, scales) and weight.granularity.axis == layer.channel_axis
        )
        if layer.channel_axis or not layer.has_weight or not is_scaled or layer.config.output is not None:
            return None
        # A class of the user's may do more after its product.
        return layer.type.operands[0].channel_axis if type(layer.module).forward in _FORWARDS else None
    # What only ran while the model was observed may be gone.
    module: Any = modules.get(name)
    is_norm = type(module) in _NORMS and len(module.normalized_shape) == 1 and module.weight is not None
    return -1 if is_norm else None


def _only_readers(
    structure: Structure, written: ModuleCall, layers: Mapping[str, QuantizedLayer], axis: int
) -> list[str]:
    """Layers that read what a call has written, unchanged but for positive factors of the channels along an axis; none
    if anything else reads it."""
    readers: list[str] = []
    waiting: list[Value] = list(written.writes)
    seen: set[Value] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if structure.is_returned(value):
            return []
        for operator in structure.readers.get(value.storage, ()):
            states = {(read.storage, read.version) for read in operator.reads}
            if (value.storage, value.version) not in states or written.index in operator.scope:
                continue
            calls = [structure.calls[index] for index in operator.scope]
            reader = next((call for call in calls if call.name in layers), None)
            if reader is not None:
                # Through another view, channels might lie elsewhere.
                if reader.operands[:1] != (value,) or len(reader.operands) != 1:
                    return []
                if reader.name not in readers:
                    readers.append(reader.name)
            elif operator.name in _HOMOGENEOUS or (operator.name in _MAXIMA and -axis > _MAXIMA[operator.name]):
                waiting += operator.writes[:1]
            elif operator.writes and all(write == value for write in operator.writes):
                # The same view of the same values.
                continue
            else:
                return []
    return readers
