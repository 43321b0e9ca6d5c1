"""Additions and average pools as modules of their own, so that an engine's formats of what they read can be said.

Engines compute a residual addition in integers only if both of its operands, and its result, are quantized. Additions
are no modules in most models, so running one batch finds them: each gets a module below the one whose ``forward``
computes it, named by its position among the additions there (``layer1.0.addition_0``), and a ``TorchFunctionMode``
leads it there from then on.
"""

import inspect
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .layer_types import Operand, layer_type_of, register_layer

log = logging.getLogger(__name__)

_IN_PLACE = {Tensor.add_}
_ADDITIONS = {torch.add, Tensor.add, *_IN_PLACE}
_MEANS = {torch.mean, Tensor.mean}
_POOLS = {F.avg_pool2d, F.adaptive_avg_pool2d, *_MEANS}
_LAST_TWO = ({2, 3}, {-2, -1})

_NAME = re.compile(r"(addition|average_pool)_(\d+)")

# Where the operations of the module that is running now are led.
_routing = threading.local()


class Addition(nn.Module):
    """Sum of two tensors, each of which an engine may want quantized.

    Example:
        >>> Addition()(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the sum, in a new tensor."""
        return torch.add(first, second)


class AveragePool(nn.Module):
    """Average over positions of an image, of whatever kind the model computes.

    Example:
        >>> AveragePool()(torch.ones(1, 2, 4, 4), lambda x: x.mean((2, 3)))
        tensor([[1., 1.]])
    """

    def forward(self, x: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the model's own function makes of an image of shape (N, C, H, W)."""
        return pool(x)


_image = Operand((-3, -2, -1), ())
register_layer(Addition, None, [Operand(), Operand()], between_layers=True)
register_layer(AveragePool, None, [_image], _image.token_axes, between_layers=True)


def _kind(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Kind of operation that a call is; None if it is none that a module can compute.

    The answer depends on no shape, so that positions stay the same from batch to batch.
    """
    if func in _ADDITIONS:
        return "addition" if len(args) == 2 and not kwargs and all(map(_is_activation, args)) else None
    if func in _POOLS and args and _is_activation(args[0]) and args[0].dim() == 4:
        if func in _MEANS:
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if not isinstance(dims, tuple | list) or set(dims) not in _LAST_TWO or "dtype" in kwargs:
                return None
        # Engines differ in how many elements of a window that hangs over the edge they divide by.
        if func is F.avg_pool2d and kwargs.get("ceil_mode", args[4] if len(args) > 4 else False):
            return None
        return "average_pool"
    return None


def _is_activation(value: Any) -> bool:
    is_tensor = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return is_tensor and value.is_floating_point() and value.dim() > 1


class _Scope:
    """One call of a module: how many operations of each kind it has computed so far, if they count."""

    def __init__(self, module: nn.Module | None, counted: bool) -> None:
        self.module, self.counted = module, counted
        self.counts: Counter[str] = Counter()

    def next_name(self, kind: str) -> str:
        name = f"{kind}_{self.counts[kind]}"
        self.counts[kind] += 1
        return name


class _Routing(TorchFunctionMode):
    """Leads the operations of the innermost running module to its modules for them."""

    def __init__(self) -> None:
        super().__init__()
        self.scopes: list[_Scope] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        scope = self.scopes[-1] if self.scopes else None
        if scope is None or not scope.counted or (func not in _ADDITIONS and func not in _POOLS):
            return func(*args, **kwargs)
        kind = _kind(func, args, kwargs)
        return func(*args, **kwargs) if kind is None else self.compute(scope, kind, func, args, kwargs)

    def compute(self, scope: _Scope, kind: str, func: Any, args: Any, kwargs: Any) -> Any:
        module = scope.module._modules.get(scope.next_name(kind))  # type: ignore[union-attr]
        if module is None:
            return func(*args, **kwargs)
        if kind == "addition":
            return module(*args)
        return module(args[0], lambda x: func(x, *args[1:], **kwargs))


class _Search(_Routing):
    """Notes all operations instead."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        # Full names, and whether the operation is in place.
        self.found: dict[str, bool] = {}

    def compute(self, scope: _Scope, kind: str, func: Any, args: Any, kwargs: Any) -> Any:
        owner = self.names[scope.module]  # type: ignore[index]
        name = f"{owner}.{scope.next_name(kind)}".removeprefix(".")
        self.found[name] = self.found.get(name, False) or func in _IN_PLACE
        return func(*args, **kwargs)


@torch.no_grad()
def find_operations(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Find the additions and average pools that can be modules of their own: as such they reproduce what ``run``
    returns.

    Those inside of layers of a quantizable type are the layer's own and are not found.

    Args:
        model: Left as it is.
        run: Calls the model on one batch and returns its output.

    Returns:
        Full names that ``route_operations`` takes.

    Example:
        >>> class Residual(nn.Module):
        ...     def forward(self, x):
        ...         return x + x.relu()
        >>> model = Residual()
        >>> find_operations(model, lambda: model(torch.ones(1, 2)))
        ['addition_0']
    """
    search = _Search({module: name for name, module in model.named_modules()})
    modules = list(model.modules())
    for module in modules:
        _wrap(module, counted=layer_type_of(module) is None)
    try:
        with _active(search):
            wanted = run()
    finally:
        for module in modules:
            _unwrap(module)
    # A sum in place may be needed where it was; then it cannot be computed elsewhere.
    for names in (list(search.found), [name for name, in_place in search.found.items() if not in_place]):
        route_operations(model, names)
        same = _is_same(run(), wanted)
        route_operations(model, ())
        if same:
            return names
    return []


def _is_same(output: Any, wanted: Any) -> bool:
    """Whether outputs hold the same tensors; False where there is nothing to compare."""
    given, reference = _tensors(output), _tensors(wanted)
    return len(given) == len(reference) > 0 and all(map(torch.equal, given, reference))


def _tensors(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += _tensors(list(vars(leaf).values()))
    return found


def route_operations(model: nn.Module, names: Collection[str]) -> None:
    """Give the model modules for exactly these operations, and lead them there; modules of earlier ones are removed.

    Args:
        model: Changed in place.
        names: Full names, from ``find_operations``.

    Raises:
        ValueError: If the model has no module that a name belongs to.

    Example:
        >>> model = nn.Sequential(nn.AvgPool2d(2))
        >>> route_operations(model, ["0.average_pool_0"])
        >>> model[0].average_pool_0
        AveragePool()
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        _unwrap(module)
        if isinstance(module, Addition | AveragePool) and name not in names:
            parent, _, child = name.rpartition(".")
            delattr(modules[parent], child)
    if not names:
        return
    owners: set[nn.Module] = set()
    for name in names:
        parent, _, child = name.rpartition(".")
        if parent not in modules:
            raise ValueError(f"The model has no module {parent}, whose {child} is to be quantized.")
        if child not in modules[parent]._modules:
            kind = is_operation(name)
            modules[parent].add_module(child, (Addition() if kind == "addition" else AveragePool()).eval())
        owners.add(modules[parent])
    for module in modules.values():
        # Operations of modules in between must not be taken for the owner's.
        _wrap(module, counted=module in owners)


def is_operation(name: str) -> str | None:
    """Kind of the operation, ``"addition"`` or ``"average_pool"``, whose module has this name; None for other names.

    Example:
        >>> is_operation("layer1.0.addition_0"), is_operation("layer1.0.conv1")
        ('addition', None)
    """
    match = _NAME.fullmatch(name.rpartition(".")[2])
    return match and match[1]


class _ScopedForward:
    """The ``forward`` of a module whose operations are led to modules, or do not count; it stands in the module's own
    attribute ``forward``, so that a copy of the module has a copy of it."""

    def __init__(self, module: nn.Module, counted: bool) -> None:
        self.module, self.counted = module, counted
        self.counts: Counter[str] | None = None
        self.warned = False
        # Of an instance, where something else has put one there.
        self.wrapped = module.__dict__.get("forward")
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = getattr(_routing, "mode", None)
        if mode is None and not self.counted:
            return self._forward(*args, **kwargs)
        # Left whatever is raised: the passes of a replay end by an exception that is no error.
        with _active(_Routing()) if mode is None else nullcontext(mode) as active:
            scope = _Scope(self.module, self.counted)
            active.scopes.append(scope)
            try:
                output = self._forward(*args, **kwargs)
            finally:
                active.scopes.pop()
        if self.counted:
            self._check(scope.counts)
        return output

    def _check(self, counts: Counter[str]) -> None:
        """Warn once if the module computes other operations than the first time: they are told apart by position."""
        if self.counts is None:
            self.counts = counts
        elif counts != self.counts and not self.warned:
            self.warned = True
            log.warning(
                "%s has computed %s and now computes %s: quantizers between layers may belong to others. Give each way "
                "through it a module of its own, or take target=None.",
                type(self.module).__name__,
                dict(self.counts),
                dict(counts),
            )

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.wrapped is not None:
            return self.wrapped(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def _wrap(module: nn.Module, counted: bool) -> None:
    if not isinstance(module, torch.jit.ScriptModule):
        module.__dict__["forward"] = _ScopedForward(module, counted)


def _unwrap(module: nn.Module) -> None:
    scoped = module.__dict__.get("forward")
    if isinstance(scoped, _ScopedForward):
        del module.__dict__["forward"]
        if scoped.wrapped is not None:
            module.__dict__["forward"] = scoped.wrapped


@contextmanager
def routed_by_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, a routed model is routed by hooks in place of its modules' attributes ``forward``, from within which
    torch.export cannot tell the full names of modules. Afterwards the model is not routed any longer.

    Args:
        model: Changed in place.

    Example:
        >>> with routed_by_hooks(nn.Linear(2, 2)):
        ...     pass
    """

    def enter(counted: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            mode = getattr(_routing, "mode", None)
            if mode is None and counted:
                mode = _routing.mode = _Routing()
                mode.__enter__()
            if mode is not None:
                mode.scopes.append(_Scope(module, counted))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode = getattr(_routing, "mode", None)
        if mode is not None:
            mode.scopes.pop()
            if not mode.scopes:
                stop()

    def stop() -> None:
        mode = getattr(_routing, "mode", None)
        if mode is not None:
            _routing.mode = None
            mode.__exit__(None, None, None)

    for module in model.modules():
        scoped = module.__dict__.get("forward")
        if isinstance(scoped, _ScopedForward):
            _unwrap(module)
            module.register_forward_pre_hook(enter(scoped.counted), prepend=True)
            module.register_forward_hook(leave)
    try:
        yield
    finally:
        stop()


@contextmanager
def _active(mode: _Routing) -> Iterator[_Routing]:
    """Inside, this mode is at work on this thread."""
    _routing.mode = mode
    try:
        with mode:
            yield mode
    finally:
        _routing.mode = None


@contextmanager
def not_routed() -> Iterator[None]:
    """Inside, no operation is led anywhere: what quantizers and observers compute is not the model's.

    Example:
        >>> with not_routed():
        ...     torch.ones(2, 2) + torch.ones(2, 2)
        tensor([[2., 2.],
                [2., 2.]])
    """
    mode = getattr(_routing, "mode", None)
    if mode is None:
        yield
        return
    mode.scopes.append(_Scope(None, counted=False))
    try:
        yield
    finally:
        mode.scopes.pop()
