"""Function calls of a model that are led to modules of their own, so that what they read can be quantized.

Additions and matrix products are no modules in most models. Running one batch finds them: each gets a module below the
one whose ``forward`` computes it, named by its position among the operations of its kind there
(``layer1.0.addition_0``), and a ``TorchFunctionMode`` leads it there from then on. A linear function of a layer's own
weight is led to that layer.
"""

import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .operation_kinds import OperationKind, is_operation, kind_named, kind_of_call

log = logging.getLogger(__name__)

# Where the operations of the module that is running now are led.
_routing = threading.local()


@dataclass(frozen=True)
class Routes:
    """What is led where.

    Args:
        operations: Full names of the modules that compute operations.
        layers: Layers whose weights another module multiplies with by a function, each with the name of that module.

    Example:
        >>> bool(Routes()), bool(Routes(("addition_0",)))
        (False, True)
    """

    operations: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.operations or self.layers)


class _Scope:
    """One call of a module: how many operations of each kind it has computed so far, if they count."""

    def __init__(self, module: nn.Module | None, counted: bool, layers: Iterable[nn.Module] = ()) -> None:
        self.module, self.counted, self.layers = module, counted, tuple(layers)
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
        if scope is None or not scope.counted:
            return func(*args, **kwargs)
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if (layer := self.layer_of(scope, weight, bias)) is None:
                return func(*args, **kwargs)
            return layer(x) if bias is None or layer.bias is not None else layer(x) + bias
        kind = kind_of_call(func, args, kwargs)
        return func(*args, **kwargs) if kind is None else self.compute(scope, kind, func, args, kwargs)

    def compute(self, scope: _Scope, kind: OperationKind, func: Any, args: Any, kwargs: Any) -> Any:
        module = scope.module._modules.get(scope.next_name(kind.name))  # type: ignore[union-attr]
        return kind.compute(module, func, args, kwargs) if isinstance(module, kind.module) else func(*args, **kwargs)

    def layer_of(self, scope: _Scope, weight: Any, bias: Any) -> nn.Module | None:
        """The layer whose weight and bias these are, of those that are led to from a scope."""
        # Parametrized weights are cached while such a scope is running.
        return next((layer for layer in scope.layers if _is_of(layer, weight, bias)), None)


class _Search(_Routing):
    """Notes all operations besides."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.layers = layers
        self.found = Found()

    def compute(self, scope: _Scope, kind: OperationKind, func: Any, args: Any, kwargs: Any) -> Any:
        owner, child = self.names[scope.module], f"{kind.name}_{scope.counts[kind.name]}"
        # A module of the user's may have this name.
        if isinstance(getattr(scope.module, child, None), kind.module | None):
            name = f"{owner}.{child}".removeprefix(".")
            self.found.operations[name] = self.found.operations.get(name, False) or func in kind.in_place
        return super().compute(scope, kind, func, args, kwargs)

    def layer_of(self, scope: _Scope, weight: Any, bias: Any) -> nn.Module | None:
        for name, layer in self.layers.items():
            if _is_of(layer, weight, bias):
                self.found.layers.setdefault(name, set()).add(self.names[scope.module])
        return super().layer_of(scope, weight, bias)


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """Arguments of ``torch.nn.functional.linear``."""
    return input, weight, bias


def _is_of(layer: nn.Module, weight: Any, bias: Any) -> bool:
    """Whether a weight is a layer's, and the bias too if the layer has one; else any may be added after it."""
    return weight is layer.weight and (layer.bias is None or bias is layer.bias)


@dataclass
class Found:
    """What a search has found.

    Args:
        operations: Full names, and whether the operation is in place.
        layers: Layers whose weight other modules multiply with, and these modules.
        output: What was run has returned.
    """

    operations: dict[str, bool] = field(default_factory=dict)
    layers: dict[str, set[str]] = field(default_factory=dict)
    output: Any = None


@torch.no_grad()
def search_operations(
    model: nn.Module,
    run: Callable[[], Any],
    own: Callable[[nn.Module], bool],
    layers: Mapping[str, nn.Module],
    routed: Routes,
) -> Found:
    """Find the calls of functions that can be led to modules.

    Args:
        model: Left as it is.
        run: Calls the model on one batch and returns its output.
        own: Whether what a module computes is its own, as in a quantizable layer, and not to be found.
        layers: Linear layers whose weight another module may multiply with.
        routed: What is led somewhere already.

    Example:
        >>> class Residual(nn.Module):
        ...     def forward(self, x):
        ...         return x + x.relu()
        >>> from lightning_calibtip.network import operations
        >>> model = Residual()
        >>> found = search_operations(model, lambda: model(torch.ones(1, 2)), lambda module: False, {}, Routes())
        >>> found.operations
        {'addition_0': False}
    """
    route(model, routed)
    search = _Search(model, layers)
    modules = list(model.modules())
    for module in modules:
        scoped = module.__dict__.get("forward")
        led_to = scoped.layers if isinstance(scoped, _ScopedForward) else ()
        _unwrap(module)
        _wrap(module, not own(module), led_to)
    try:
        with _active(search):
            search.found.output = run()
    finally:
        for module in modules:
            _unwrap(module)
        route(model, routed)
    return search.found


def route(model: nn.Module, routes: Routes) -> None:
    """Give the model modules for exactly these operations, and lead them there; modules of earlier ones are removed.

    Args:
        model: Changed in place.
        routes: What is led where.

    Raises:
        ValueError: If the model has no module of a name.

    Example:
        >>> from lightning_calibtip.network import operations
        >>> model = nn.Sequential(nn.AvgPool2d(2))
        >>> route(model, Routes(("0.average_pool_0",)))
        >>> model[0].average_pool_0
        AveragePool()
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        _unwrap(module)
        parent, _, child = name.rpartition(".")
        kind = is_operation(name)
        if kind and name not in routes.operations and isinstance(module, kind_named(kind).module):
            delattr(modules[parent], child)
    if not routes:
        return
    owners: dict[nn.Module, list[nn.Module]] = {}
    for name in routes.operations:
        parent, _, child = name.rpartition(".")
        kind = is_operation(name)
        if parent not in modules or kind is None:
            raise ValueError(f"The model has no module {parent}, whose {child} is to be quantized.")
        if child not in modules[parent]._modules:
            modules[parent].add_module(child, kind_named(kind).module().eval())
        owners.setdefault(modules[parent], [])
    for name, owner in routes.layers.items():
        if owner not in modules or name not in modules:
            raise ValueError(f"The model has no module {owner} that multiplies with the weight of {name}.")
        owners.setdefault(modules[owner], []).append(modules[name])
    for module in modules.values():
        # Operations of modules in between must not be taken for the owner's.
        _wrap(module, module in owners, owners.get(module, ()))


class _ScopedForward:
    """The ``forward`` of a module whose operations are led to modules, or do not count; it stands in the module's own
    attribute ``forward``, so that a copy of the module has a copy of it."""

    def __init__(self, module: nn.Module, counted: bool, layers: Iterable[nn.Module]) -> None:
        self.module, self.counted, self.layers = module, counted, tuple(layers)
        self.counts: Counter[str] | None = None
        self.warned = False
        # Of an instance, where something else has put one there.
        self.wrapped = module.__dict__.get("forward")
        # Functions of PyTorch itself have none.
        with suppress(ValueError):
            self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = getattr(_routing, "mode", None)
        if mode is None and not self.counted:
            return self._forward(*args, **kwargs)
        # Left whatever is raised: the passes of a replay end by an exception that is no error.
        with ExitStack() as stack:
            active = stack.enter_context(_active(_Routing()) if mode is None else nullcontext(mode))
            if self.layers:
                stack.enter_context(parametrize.cached())
            scope = _Scope(self.module, self.counted, self.layers)
            active.scopes.append(scope)
            stack.callback(active.scopes.pop)
            output = self._forward(*args, **kwargs)
        if self.counted:
            self._check(scope.counts)
        return output

    def _check(self, counts: Counter[str]) -> None:
        """Warn once if the module computes other operations than the first time: they are told apart by position."""
        routed = {is_operation(name) for name in self.module._modules}
        counts = Counter({kind: count for kind, count in counts.items() if kind in routed})
        if self.counts is None:
            self.counts = counts
        elif counts != self.counts and not self.warned:
            self.warned = True
            log.warning(
                "%s has computed %s and now computes %s: quantizers of these may belong to others. Give each way "
                "through it a module of its own.",
                type(self.module).__name__,
                dict(self.counts),
                dict(counts),
            )

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.wrapped is not None:
            return self.wrapped(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def _wrap(module: nn.Module, counted: bool, layers: Iterable[nn.Module] = ()) -> None:
    if not isinstance(module, torch.jit.ScriptModule):
        module.__dict__["forward"] = _ScopedForward(module, counted, layers)


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

    def enter(counted: bool, layers: Iterable[nn.Module]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            mode = getattr(_routing, "mode", None)
            if mode is None and counted:
                mode = _routing.mode = _Routing()
                mode.__enter__()
            if mode is not None:
                mode.scopes.append(_Scope(module, counted, layers))

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
            module.register_forward_pre_hook(enter(scoped.counted, scoped.layers), prepend=True)
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
