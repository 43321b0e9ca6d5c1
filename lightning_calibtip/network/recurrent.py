"""Recurrent layers of PyTorch with their weights, and the sequence that they read, as modules that can be quantized.

PyTorch computes a whole layer over all time steps in one kernel, from a list of its weights. What the layer hands from
step to step inside of it stays in float.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import register_pytree_node, tree_leaves

from .layer_types import Operand, register_layer
from .preparations import Preparation, register_preparation
from .product_inputs import ProductInput, input_name
from .product_weights import held_weights, hold_weights

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

# The child that the input goes through.
SEQUENCE = "sequence"


class SequenceInput(ProductInput):
    """What a recurrent layer reads, as a module of its own, so that it can be quantized.

    Example:
        >>> SequenceInput()(torch.ones(1))
        tensor([1.])
    """


# Releases of PyTorch before 2.7 do not look for the tensors in a packed sequence, which is a named tuple.
_packed = PackedSequence(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
if len(tree_leaves(_packed)) == 1:
    register_pytree_node(PackedSequence, lambda packed: (list(packed), None), lambda parts, _: PackedSequence(*parts))

# Whether the first dimension runs over samples or over time depends on the layer.
register_layer(SequenceInput, None, [Operand((-1,), ())], (), part=True)


def hold_recurrent_weights(model: nn.Module) -> None:
    """Give the recurrent layers of a model (``LSTM``, ``GRU``, ``RNN``, their cells, and derived classes) modules for
    their weights and for the sequence that they read; what the model computes stays the same.

    Layers with weights that are computed (by parametrizations or hooks) or shared stay as they are.

    Args:
        model: Changed in place.

    Example:
        >>> lstm = nn.LSTM(2, 3)
        >>> hold_recurrent_weights(lstm)
        >>> [name for name, _ in lstm.named_children()]
        ['weight_ih_l0_matrix', 'weight_hh_l0_matrix', 'sequence']
    """
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for module in list(model.modules()):
        if not isinstance(module, _RECURRENT) or isinstance(module, torch.jit.ScriptModule):
            continue
        found = module._flat_weights_names if isinstance(module, nn.RNNBase) else ["weight_ih", "weight_hh"]
        names = [name for name in found if name.startswith("weight_")]
        own = [parameter for name in names if (parameter := module._parameters.get(name)) is not None]
        alone = all(counts[id(parameter)] == 1 for parameter in own)
        if len(own) == len(names) and alone and not hasattr(module, SEQUENCE):
            _hold(module, names)


def float_part(module: nn.Module) -> str:
    """What stays float of the products of a module whose weights are modules of their own; ``""`` for other modules.

    Example:
        >>> lstm = nn.LSTM(2, 3)
        >>> hold_recurrent_weights(lstm)
        >>> float_part(lstm), float_part(nn.Linear(2, 3))
        ('its hidden states and its biases stay float', '')
    """
    held = held_weights(module)
    if held and isinstance(module, _RECURRENT):
        return "its hidden states and its biases stay float"
    held = {name: weight for name, weight in held.items() if input_name(name) not in module._modules}
    return f"what is multiplied with its {', '.join(held)} stays float" if held else ""


def _hold(module: nn.Module, names: list[str]) -> None:
    members: dict[str, Any] = {}
    if isinstance(module, nn.RNNBase):
        # PyTorch's own list would hold on to weights of earlier passes.
        module.__dict__.pop("_flat_weights", None)
        members = {"_flat_weights": property(_flat_weights, lambda self, value: None)}
        members |= dict.fromkeys(("_init_flat_weights", "_update_flat_weights", "flatten_parameters"), _nothing)
    hold_weights(module, dict.fromkeys(names, 1), members)
    module.add_module(SEQUENCE, SequenceInput().train(module.training))
    cls = type(module)
    cls.forward = _through_sequence(cls.forward)


def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _nothing(self: nn.RNNBase) -> None:
    """Weights are read anew in each pass."""


def _through_sequence(computed: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a recurrent layer, whose input goes through the module for it."""

    @wraps(computed)
    def forward(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        sequence = self._modules[SEQUENCE]
        input = input._replace(data=sequence(input.data)) if isinstance(input, PackedSequence) else sequence(input)
        # In eval mode cuDNN's kernels have no gradient.
        wants_gradient = torch.is_grad_enabled() and not self.training
        with torch.backends.cudnn.flags(enabled=False) if wants_gradient else nullcontext():
            return computed(self, input, *args, **kwargs)

    return forward


class RecurrentPreparation(Preparation):
    """Gives recurrent layers modules for their weights and for the sequence that they read.

    Example:
        >>> lstm = nn.LSTM(2, 3)
        >>> RecurrentPreparation().prepare(lstm)
        >>> len(list(lstm.children()))
        3
    """

    def prepare(self, model: nn.Module) -> None:
        """See ``hold_recurrent_weights``."""
        hold_recurrent_weights(model)

    def float_part(self, module: nn.Module) -> str:
        """See ``float_part``."""
        return float_part(module)


register_preparation(RecurrentPreparation())
