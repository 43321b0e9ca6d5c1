"""A quantized model must not give NaN where the float model does not."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..batches import is_finite
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
    output, ruined = _run(network, calibration, quantized=True)
    if not _has_nan(output):
        return
    known: list[str] = []
    if network.has_float_weights:
        float_output, known = _run(network, calibration, quantized=False)
        if _has_nan(float_output):
            # A mask of minus infinity, say, which is the user's own.
            return
    elif not any(bool(leaf.isnan().any()) for leaf in _floats(output)):
        return
    # Quantizers and parametrizations are inside of their layer.
    names = [next((x for x in network.layers if name == x or name.startswith(f"{x}.")), name) for name in ruined]
    name = next((name for name in names if name not in known), "")
    parts = [what for what, tensor in _parameters(network, name) if not is_finite(tensor)]
    where = f"first that of {'layer' if name in network.layers else 'module'} {name}" if name else "of no module's own"
    why = f", whose {' and '.join(parts)} has such values, too" if parts else ""
    advice = f"Leave it in float (overrides={{{name!r}: None}}), give it more bits, or look at its weights and data."
    if name not in network.layers:
        advice = "Give the layers before it more bits, or leave them in float by overrides."
    raise FloatingPointError(
        f"The quantized model's output has NaN or infinity, which the float model's has not: {where}{why}. {advice}"
    )


def _run(network: QuantizedNetwork, calibration: CalibrationSet, quantized: bool) -> tuple[Any, list[str]]:
    """Output for the first batch, and the modules that give NaN or infinity, in the order in which they run."""
    ruined: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name not in ruined and _has_nan(output):
                ruined.append(name)

        return module.register_forward_hook(hook)

    watched = {name: module for name, module in network.model.named_modules() if not list(module.children())}
    watched |= {name: layer.module for name, layer in network.layers.items()}
    handles = [watch(name, module) for name, module in watched.items()]
    try:
        with network.quantized(quantized):
            return calibration.run(0), ruined
    finally:
        for handle in handles:
            handle.remove()


def _floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _has_nan(output: Any) -> bool:
    return not all(is_finite(leaf) for leaf in _floats(output))


def _parameters(network: QuantizedNetwork, name: str) -> list[tuple[str, Tensor]]:
    if name not in network.layers:
        return []
    layer = network.layers[name]
    weight, bias = layer.latent()
    found = [("weight", weight)] + ([] if bias is None else [("bias", bias)])
    found += [(f"{key} of {q.name}", value) for q in layer.quantizers for key, value in q.named_parameters()]
    return found
