"""The recorder of a model's structure: what happens while the model runs one batch.

Module hooks see which module was called when, with which tensors; a ``TorchDispatchMode`` sees every operator between
them, with the identity and the version of each tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..batches import plain
from .float_matmuls import find_float_matmuls
from .folding import prove_folds
from .functional import find_products
from .layer_types import layer_type_of, quantizable_layers
from .operations import find_operations
from .preparations import preparations
from .product_parameters import find_product_parameters, hold_product_parameters
from .routing import Routes, route
from .structure import Activation, ModuleCall, Operator, Structure, Value

_ACTIVATIONS = {
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "sigmoid", "tanh", "softplus", "log_sigmoid", "threshold", "clamp", "clamp_min",
}  # fmt: skip

_MASKS = (torch.bool, torch.uint8)


def observe(model: nn.Module, run: Callable[[], Any], between_layers: bool = False) -> Structure:
    """Record what happens to one batch, and find out which BatchNorms can be folded.

    What modules compute inside of themselves gets modules, see ``preparations``, and so do products that the model
    computes by functions, see ``functional``, and parameters of other products, see ``product_parameters``. The model
    computes the same as before, and nothing else of it is changed.

    Args:
        model: The float model, in eval mode.
        run: Calls the model once, on one batch, and returns its output.
        between_layers: Whether additions and pools become modules, too, see ``operations``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
        >>> observe(net, lambda: net(torch.ones(1, 1, 4, 4))).folds
        (Fold(layer='0', normalization='1'),)
    """
    with _full_precision():
        for preparation in preparations():
            preparation.settle(model, run)
        structure, routes = record(model, run), Routes()
        if find_float_matmuls(structure, list(quantizable_layers(model))):
            routes = find_products(model, run, lambda: record(model, run))
        if _hold_parameters(model, structure):
            structure = record(model, run)
        if between_layers:
            routes = find_operations(model, run, routes)
        if routes:
            route(model, routes)
            structure = record(model, run)
        structure.led_layers = dict(routes.layers)
        structure.folds, structure.unfolded_norms = prove_folds(model, structure, run)
    return structure


def _hold_parameters(model: nn.Module, structure: Structure) -> bool:
    """Give modules to the parameters of products; returns whether there are some."""
    found = find_product_parameters(model, structure, list(quantizable_layers(model)))
    hold_product_parameters(model, found, structure.calls_of)
    return bool(found)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Inside, autocast is off: what rounding to 16 bits changes is no difference between two ways to compute."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def record(model: nn.Module, run: Callable[[], Any]) -> Structure:
    """Run one batch and record what happens.

    Args:
        model: The model; its own mode (train or eval) is left as it is.
        run: Calls the model once, on one batch.

    Returns:
        The record, from which facts about the model follow.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
        >>> structure = record(net, lambda: net(torch.ones(1, 1, 4, 4)))
        >>> structure.normalization_after("0", lambda name: name == "1")
        ('1', '')
    """
    with _recording(model) as structure:
        run()
    return structure


@contextmanager
def _recording(model: nn.Module) -> Iterator[Structure]:
    recorder = _Recorder()
    structure = recorder.structure

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            structure.calls.append(
                ModuleCall(
                    index=len(structure.calls),
                    name=name,
                    # Also those of objects, such as graphs.
                    reads=recorder.values(plain((args, kwargs))),
                    start=len(structure.operators),
                    outermost=not recorder.scope,
                    operands=recorder.operands(args, kwargs),
                )
            )
            recorder.scope.append(structure.calls[-1].index)

        return hook

    def leaving(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = structure.calls[recorder.scope.pop()]
        call.writes = recorder.values(plain(output))
        call.stop = len(structure.operators)

    handles = []
    for name, module in model.named_modules():
        layer_type = layer_type_of(module)
        weight = module._parameters.get((layer_type and layer_type.weight) or "")
        if weight is not None:
            structure.weights[name] = recorder.value(weight).storage
        for key, parameter in module._parameters.items():
            if parameter is not None and _has_storage(parameter):
                structure.parameters[f"{name}.{key}".removeprefix(".")] = recorder.value(parameter).storage
        handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leaving, with_kwargs=True))
    try:
        with torch.no_grad(), recorder:
            yield structure
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchDispatchMode):
    """Writes down every operator; hooks on the modules tell it where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.structure = Structure()
        self.scope: list[int] = []
        self._serials: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count = 0

    def value(self, tensor: Tensor, later: int = 0) -> Value:
        """Identity of the present state of a tensor; an address that was freed and taken again is a new storage."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._serials.get(address)
        if known is None or known[0].expired():
            self._count += 1
            known = (StorageWeakRef(storage), self._count)
            self._serials[address] = known
        version = 0 if tensor.is_inference() else tensor._version
        view = (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        return Value(known[1], version + later, view)

    def values(self, tree: Any) -> tuple[Value, ...]:
        """Identities of all tensors in nested arguments."""
        return tuple(self.value(leaf) for leaf in tree_leaves(tree) if _has_storage(leaf))

    def operands(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Value | None, ...]:
        """Identities of the arguments that quantizers would take, see ``ModuleCall``."""
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        return tuple(self.value(tensor) if _has_storage(tensor) else None for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = self.values((args, kwargs))
        output = func(*args, **kwargs)
        mutates = func._schema.is_mutable
        written = [leaf for leaf in tree_leaves(output) if _has_storage(leaf)]
        # The version counter of an in-place operator moves only after this call.
        changed = {value.storage for value in reads} if mutates else set()
        writes = tuple(self.value(t, int(self.value(t).storage in changed)) for t in written)
        name = func._schema.name.removeprefix("aten::").removesuffix("_").removeprefix("_")
        if name == "constant_pad_nd" and len(args) > 2 and args[2] != 0:
            # Only zero is on every grid.
            name += "_nonzero"
        replay = _replay(func, args, kwargs) if name in _ACTIVATIONS else None
        is_view = not mutates and any(returned.alias_info is not None for returned in func._schema.returns)
        decisive = self.values(_decisive(func, args, kwargs))
        self.structure.operators.append(Operator(name, reads, writes, tuple(self.scope), replay, is_view, decisive))
        return output


def _decisive(func: Any, args: Any, kwargs: Any) -> Any:
    """Arguments whose values decide over the shape of what an operator returns, or over a number."""
    if not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags):
        return ()
    if func.overloadpacket is not torch.ops.aten.index:
        return args, kwargs
    return [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and leaf.dtype in _MASKS]


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested


def _replay(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Activation | None:
    """The activation as a differentiable function of its input, or None if it reads other tensors too."""
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args[1:], kwargs))):
        return None
    in_place = func._schema.is_mutable

    def activation(x: Tensor) -> Tensor:
        output: Tensor = func(x.clone() if in_place else x, *args[1:], **kwargs)
        return output

    return activation
