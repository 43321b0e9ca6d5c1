"""A quantized model must not give NaN where the float model does not."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..network.network import QuantizedNetwork
from .calibration_set import CalibrationSet


@torch.no_grad()
def require_finite_outputs(network: QuantizedNetwork, calibration: CalibrationSet) -> None:
    """Raise where the quantized model's output for the first calibration batch has NaN or infinity that the float
    model's has not.

    Args:
        network: Calibrated network.
        calibration: Calibration set with at least one batch.

    Raises:
        FloatingPointError: If it has; the message names the first layer that gives such a value, and which of its
            parameters has one.

    Example:
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> from lightning_calibtip.quantization.ranges import RangeOptions
        >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.randn(8, 2))
        >>> network = QuantizedNetwork(model, QuantizationScheme())
        >>> network.prepare(lambda: calibration.run(0))
        >>> network.attach_observers(RangeOptions())
        >>> with network.observing():
        ...     _ = calibration.run(0)
        >>> network.fit_ranges()
        >>> require_finite_outputs(network, calibration)
        >>> _ = network.layers["0"].bias.data.fill_(float("nan"))
        >>> require_finite_outputs(network, calibration)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FloatingPointError: The quantized model's output has NaN or infinity, ...: first that of layer 0, whose bias ...
    """
    first: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not first and _has_nan(output):
                first.append(name)

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in network.model.named_modules() if not list(module.children())]
    handles += [watch(name, layer.module) for name, layer in network.layers.items()]
    try:
        with network.quantized(True):
            output = calibration.run(0)
    finally:
        for handle in handles:
            handle.remove()
    if not _has_nan(output):
        return
    if network.has_float_weights:
        with network.quantized(False):
            if _has_nan(calibration.run(0)):
                # A mask of minus infinity, say, which is the user's own.
                return
    name = first[0] if first else ""
    # Its quantizers and parametrizations are inside of a layer.
    owner = next((layer for layer in network.layers if name == layer or name.startswith(f"{layer}.")), name)
    parts = [what for what, tensor in _parameters(network, owner) if not bool(torch.isfinite(tensor).all())]
    where = f"first that of layer {owner}" if owner else "no layer's own"
    why = f", whose {' and '.join(parts)} has such values, too" if parts else ""
    raise FloatingPointError(
        f"The quantized model's output has NaN or infinity, which the float model's has not: {where}{why}. Leave that "
        f"layer in float (overrides={{{owner!r}: None}}), give it more bits, or look at its weights and data."
    )


def _has_nan(output: Any) -> bool:
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return any(not bool(torch.isfinite(leaf).all()) for leaf in leaves)


def _parameters(network: QuantizedNetwork, name: str) -> list[tuple[str, Tensor]]:
    if name not in network.layers:
        return []
    layer = network.layers[name]
    weight, bias = layer.latent()
    found = [("weight", weight)] + ([] if bias is None else [("bias", bias)])
    found += [(f"{key} of {q.name}", value) for q in layer.quantizers for key, value in q.named_parameters()]
    return found
