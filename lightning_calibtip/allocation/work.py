"""What each layer does for one sample, counted while one batch runs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..batches import batch_size
from ..calibration.calibration_set import CalibrationSet
from ..network.layer_types import layer_type_of
from ..network.network import QuantizedNetwork

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What a layer does for one sample, over all its calls.

    Args:
        multiply_accumulates: Number of multiply-accumulates.
        input_elements: Number of elements of its quantized inputs.

    Example:
        See ``measure_work``.
    """

    multiply_accumulates: float
    input_elements: float


@torch.no_grad()
def measure_work(network: QuantizedNetwork, calibration: CalibrationSet, warns: bool = True) -> dict[str, Work]:
    """Count the work of every quantizable layer on the first calibration batch.

    Multiply-accumulates are half of what torch's ``FlopCounterMode`` counts while the layer runs. Layers that do not
    run, embeddings, and weights and inputs that are layers of their own, as those of an LSTM, have none.

    Args:
        network: Network that has been prepared.
        calibration: Calibration set with at least one batch.
        warns: Whether layers whose work cannot be counted are named in a warning.

    Returns:
        Work of each layer by name, whether the layer is quantized or stays in float.

    Example:
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
        >>> calibration = CalibrationSet(lambda batch, index: model(batch))
        >>> calibration.append(torch.ones(4, 2))
        >>> network = QuantizedNetwork(model, QuantizationScheme())
        >>> network.prepare(lambda: calibration.run(0))
        >>> measure_work(network, calibration)
        {'0': Work(multiply_accumulates=6.0, input_elements=2.0)}
    """
    names = [*network.layers, *network.float_layers]
    operations, elements = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    counter = FlopCounterMode(display=False)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            layer_type = layer_type_of(module)
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            inputs = [leaf for leaf in leaves if leaf.is_floating_point()]
            elements[name] += sum(leaf.numel() for leaf in inputs[: len(layer_type.operands) if layer_type else 1])
            operations[name] -= counter.get_total_flops()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            operations[name] += counter.get_total_flops()

        return hook

    handles = []
    for name in names:
        module = network.model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        with counter:
            calibration.run(0)
    finally:
        for handle in handles:
            handle.remove()
    parts = {name for name, layer in network.layers.items() if layer.type.part}
    if warns and (idle := [name for name in names if operations[name] == 0 and (elements[name] > 0 or name in parts)]):
        log.warning("%s: no multiply-accumulates can be counted; they cost no bit operations.", ", ".join(idle))
    samples = batch_size(calibration.batches[0])
    return {name: Work(operations[name] / 2 / samples, elements[name] / samples) for name in names}
