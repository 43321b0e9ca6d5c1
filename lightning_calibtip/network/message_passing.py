"""Message passing of PyTorch Geometric: messages, and what is aggregated of them, as modules, so that both can be
quantized (Degree-Quant: Tailor, Fernandez-Marques, Lane 2021).

The library calls hooks around the functions of its layers, those of users' too; they lead what is passed through the
modules. It is not imported here: a model with such a layer has imported it."""

import logging
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .edges import Edges, begin_edges, edges_of, end_edges
from .functional import is_close
from .hooks import OwnRows
from .layer_types import Operand, register_layer
from .preparations import Preparation, register_preparation

log = logging.getLogger(__name__)

# Children of a layer: for what it sends along edges, for what nodes get of it, and, where messages are products, for
# each factor, by the name of the argument of ``message``.
MESSAGES, AGGREGATES, FACTOR = "messages", "aggregates", "factor_"

_LIBRARY = "torch_geometric.nn.conv.message_passing"


class Messages(nn.Module, OwnRows):
    """What a layer of message passing sends along edges, as a module of its own, so that it can be quantized.

    Args:
        layer: The layer.

    Example:
        >>> Messages(nn.Identity())(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Not as a submodule: it is one of the layer's.
        self._layer = [layer]

    @property
    def edges(self) -> Edges | None:
        """Edges that the layer is passing messages along; None while it does not."""
        return edges_of(self._layer[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return messages, shape (edges, ..., features)."""
        return x

    def counted_rows(self, tokens: Tensor | None, rows: int) -> Tensor | None:
        """The edges to nodes that count, without those from nodes that are protected."""
        edges = self.edges
        if edges is None or rows != edges.count:
            return None
        counted = tokens[edges.ends[1]] if tokens is not None and edges.are_of(tokens) else None
        if counted is not None and not bool(counted.any()):
            # No node that counts gets a message, but those that send to others are like them.
            counted = None
        return without(counted, self.protected_rows(rows))

    def protected_rows(self, rows: int) -> Tensor | None:
        """Which of so many rows are those of protected nodes, bool, shape (rows,); None if none is.

        Args:
            rows: Number of edges, or what the tensor in question has in their place.
        """
        edges = self.edges
        if edges is None or edges.protected is None or rows != edges.count:
            return None
        return edges.protected[edges.senders]


class MessageFactor(Messages):
    """A factor of messages that are products, as a module of its own; see ``Messages`` for an example."""


class Aggregates(Messages):
    """What the nodes of a layer of message passing get, as a module of its own, so that it can be quantized.

    Example:
        >>> Aggregates(nn.Identity())(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    # Whether the in-degrees of the nodes of the last call are kept, and those.
    keeps_degrees = False
    degrees: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what is aggregated, shape (nodes, ..., features)."""
        edges = self.edges
        if self.keeps_degrees and edges is not None:
            found = edges.in_degrees()
            self.degrees = nn.functional.pad(found, (0, max(len(x) - len(found), 0)))
        return x

    def counted_rows(self, tokens: Tensor | None, rows: int) -> Tensor | None:
        """The nodes that count, without those that are protected."""
        protected, edges = self.protected_rows(rows), self.edges
        if tokens is not None and tokens.dim() == 1 and edges is not None:
            tokens = tokens if len(tokens) == rows and edges.are_of(tokens) else None
        return tokens if protected is None else without(tokens, protected)

    def protected_rows(self, rows: int) -> Tensor | None:
        """Which of so many nodes are protected, see ``Messages``."""
        edges = self.edges
        if edges is None or edges.protected is None or rows < edges.nodes:
            return None
        # The last nodes of a graph may have no edges.
        return nn.functional.pad(edges.protected, (0, rows - len(edges.protected)))


def without(counted: Tensor | None, protected: Tensor | None) -> Tensor | None:
    """Which rows count of those that are not protected; if that would leave none, protection does not count.

    Args:
        counted: Which rows count, bool, shape (rows,); None if all do.
        protected: Which rows are protected; None if none is.

    Example:
        >>> without(None, torch.tensor([True, False]))
        tensor([False,  True])
    """
    if protected is None:
        return counted
    left = ~protected if counted is None else counted & ~protected
    return left if bool(left.any()) else counted


# A range that is found at run time is that of an edge, or of a node, whose rows may be left out. Of a factor it may be
# that of a single number.
register_layer(MessageFactor, None, [Operand((), (1,))], (1,), part=True, in_engines=False)
register_layer(Messages, None, [Operand((-1,), (1,))], (1,), part=True, in_engines=False)
# It computes as ``torch.nn.Linear`` does.
register_layer("torch_geometric.nn.dense.linear.Linear", 0, [Operand(channel_axis=-1)], adds_bias=True, input_axis=1)


def message_passing_layers(model: nn.Module) -> dict[str, Any]:
    """Find the layers of message passing in a model, by their full names.

    Example:
        >>> message_passing_layers(nn.Linear(2, 2))
        {}
    """
    library = sys.modules.get(_LIBRARY)
    if library is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, library.MessagePassing)}


def message_factors(layer: Any) -> dict[str, nn.Module]:
    """The modules for factors of a layer's messages, by the names of the arguments of its ``message``.

    Example:
        >>> message_factors(nn.Linear(2, 2))
        {}
    """
    found = {name: child for name, child in layer._modules.items() if isinstance(child, MessageFactor)}
    return {name.removeprefix(FACTOR): child for name, child in found.items()}


def _note_edges(layer: Any, inputs: tuple[Any, Any, dict[str, Any]]) -> None:
    """Hook before ``propagate``."""
    edge_index, size, given = inputs
    names = {name[:-2] for name in _arguments(layer) if name.endswith(("_i", "_j"))}
    values = [value for name, value in given.items() if name in names and value is not None]
    pairs = [size, *(value if isinstance(value, tuple | list) else (value, value) for value in values)]
    counts = [[_nodes_of(layer, x) for x in pair] for pair in pairs if pair]
    targets = (pair[layer.flow == "source_to_target"] for pair in counts)
    known = next((count for count in targets if count is not None), None)
    begin_edges(layer, edge_index, any(first != second for first, second in counts), known)


def _nodes_of(layer: Any, x: Any) -> int | None:
    if isinstance(x, Tensor) and -x.dim() <= layer.node_dim < x.dim():
        return x.size(layer.node_dim)
    return x if isinstance(x, int) else None


def _forget_edges(layer: Any, *_: Any) -> None:
    """Hook before and after ``forward``."""
    end_edges(layer)


def _through_factors(layer: Any, inputs: tuple[dict[str, Any]]) -> tuple[dict[str, Any]] | None:
    """Hook before ``message``."""
    (given,) = inputs
    factors = {name: module for name, module in message_factors(layer).items() if _is_real(given.get(name))}
    return (
        ({**given, **{name: _as_rows(module, given[name]) for name, module in factors.items()}},) if factors else None
    )


def _as_rows(module: nn.Module, factor: Tensor) -> Tensor:
    """A factor that has gone through its module, which takes a weight of each edge for a row."""
    output: Tensor = module(factor.unsqueeze(-1)).squeeze(-1) if factor.dim() == 1 else module(factor)
    return output


def _through_messages(layer: Any, inputs: tuple[dict[str, Any]], output: Any) -> Any:
    """Hook after ``message``."""
    module = layer._modules.get(MESSAGES)
    return module(output) if module is not None and _is_real(output) else None


def _through_aggregates(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """Hook after ``aggregate``, and after ``message_and_aggregate``."""
    module = layer._modules.get(AGGREGATES)
    return module(output) if module is not None and _is_real(output) else None


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided


def _hold(name: str, layer: Any, children: Mapping[str, type[Messages]]) -> None:
    """Give a layer modules for what it passes, and lead that through them."""
    for child, make in children.items():
        if hasattr(layer, child):
            log.warning("%s has an attribute %s of its own: what would have this name stays float.", name, child)
        else:
            layer.add_module(child, make(layer).train(layer.training))
    if not layer.__dict__.get("_passes_through_modules"):
        # Functions of this file, not methods or closures: copies of the layer have them too.
        layer.register_forward_pre_hook(_forget_edges)
        layer.register_propagate_forward_pre_hook(_note_edges)
        layer.register_forward_hook(_forget_edges, always_call=True)
        layer.register_message_forward_pre_hook(_through_factors)
        layer.register_message_forward_hook(_through_messages)
        layer.register_aggregate_forward_hook(_through_aggregates)
        layer.register_message_and_aggregate_forward_hook(_through_aggregates)
        layer.__dict__["_passes_through_modules"] = True


@dataclass
class _Passed:
    """What running has shown of one layer of message passing."""

    messages: bool = False
    aggregates: bool = False
    fused: bool = False
    unknown: bool = False
    factors: dict[str, None] = field(default_factory=dict)


class _Factors(TorchDispatchMode):
    """Sees which arguments of ``message`` are multiplied with each other, element by element."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.storages = {each.untyped_storage()._cdata: name for name, each in given.items() if _is_real(each)}
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mul", "aten::mul_"):
            # Views of an argument are the argument.
            factors = [self.storages.get(x.untyped_storage()._cdata) for x in args[:2] if _is_real(x)]
            if len(set(factors)) > 1 and None not in factors:
                self.found.update(dict.fromkeys(factor for factor in factors if factor is not None))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _watch(layers: Mapping[str, Any], run: Callable[[], Any]) -> tuple[dict[str, _Passed], Any]:
    """What the layers pass while one batch runs, and what the model returns."""
    found = {name: _Passed() for name in layers}
    modes: list[_Factors] = []

    def begin(layer: Any, inputs: tuple[dict[str, Any]]) -> None:
        modes.append(_Factors(inputs[0]))
        modes[-1].__enter__()

    def watch_messages(passed: _Passed) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            mode = modes.pop()
            mode.__exit__(None, None, None)
            passed.messages |= _is_real(output)
            passed.unknown |= not _is_real(output)
            passed.factors.update(mode.found)

        return hook

    def watch_aggregates(passed: _Passed, fused: bool) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            passed.aggregates |= _is_real(output)
            passed.fused |= fused

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            passed = found[name]
            for handle in (
                layer.register_message_forward_pre_hook(begin),
                layer.register_message_forward_hook(watch_messages(passed)),
                layer.register_aggregate_forward_hook(watch_aggregates(passed, False)),
                layer.register_message_and_aggregate_forward_hook(watch_aggregates(passed, True)),
            ):
                stack.callback(handle.remove)
        try:
            return found, run()
        finally:
            for mode in reversed(modes):
                mode.__exit__(None, None, None)


class MessagePassingPreparation(Preparation):
    """Gives layers of message passing modules for their messages and for what is aggregated of them.

    Messages that are products of two arguments (of features and a weight, or attention, of each edge) have their
    factors quantized, too. Where a sparse adjacency lets a layer multiply without making messages, it makes them from
    then on, if that gives the same.

    Example:
        >>> MessagePassingPreparation().possible_names(nn.Linear(2, 2))
        []
    """

    def settle(self, model: nn.Module, run: Callable[[], Any]) -> None:
        """Run the model, and give modules to what its layers pass."""
        layers = message_passing_layers(model)
        if not layers:
            return
        found, wanted = _watch(layers, run)
        fused = {name: layers[name] for name, passed in found.items() if passed.fused}
        for layer in fused.values():
            layer.fuse = False
        if fused:
            apart, output = _watch(layers, run)
            if is_close(output, wanted):
                found = apart
            else:
                log.warning(
                    "%s: message and aggregate give something else than message_and_aggregate, so what is sent along "
                    "sparse edges stays float.",
                    ", ".join(fused),
                )
                for layer in fused.values():
                    layer.fuse = True
        for name, layer in layers.items():
            passed = found[name]
            children: dict[str, type[Messages]] = {f"{FACTOR}{key}": MessageFactor for key in passed.factors}
            children |= {MESSAGES: Messages} if passed.messages else {}
            children |= {AGGREGATES: Aggregates} if passed.aggregates else {}
            if passed.unknown:
                layer.__dict__["_passes_unknown"] = True
                log.warning("%s: what it sends along edges is no single tensor of numbers, and stays float.", name)
            if children:
                _hold(name, layer, children)

    def restore(self, model: nn.Module, layers: Collection[str]) -> None:
        """Give layers the modules that a plan names."""
        for name, layer in message_passing_layers(model).items():
            prefix = f"{name}." if name else ""
            own = [each.removeprefix(prefix) for each in layers if each.startswith(prefix)]
            children: dict[str, type[Messages]] = {
                child: {MESSAGES: Messages, AGGREGATES: Aggregates}.get(child, MessageFactor)
                for child in own
                if child in (MESSAGES, AGGREGATES) or (child.startswith(FACTOR) and "." not in child)
            }
            if children := {child: make for child, make in children.items() if child not in layer._modules}:
                _hold(name, layer, children)
            if MESSAGES in layer._modules:
                layer.fuse = False

    def possible_names(self, model: nn.Module) -> list[str]:
        """Modules that running may give to layers of message passing."""
        return [
            f"{name}.{child}".removeprefix(".")
            for name, layer in message_passing_layers(model).items()
            for child in (MESSAGES, AGGREGATES, *(f"{FACTOR}{key}" for key in _arguments(layer)))
        ]

    def float_part(self, module: nn.Module) -> str:
        """Parameters that a layer of message passing computes with by itself."""
        if module.__dict__.get("_passes_unknown"):
            return "what it sends along edges is no single tensor of numbers, and stays float"
        if not module.__dict__.get("_passes_through_modules"):
            return ""
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        return f"its own {', '.join(own)} stay{'s' if len(own) == 1 else ''} float" if own else ""


def _arguments(layer: Any) -> list[str]:
    """Names of the arguments of a layer's ``message``."""
    names: list[str] = layer.inspector.get_param_names("message")
    return names


register_preparation(MessagePassingPreparation())
