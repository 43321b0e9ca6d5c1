"""Folding of BatchNorm into the layer before it (Jacob et al. 2018, section 3.2), where the structure or running has
proved the pair."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from ..batches import is_finite
from .layer_types import LayerType, layer_type_of, quantizable_layers
from .structure import Fold, Structure
from .tying import find_ties, with_baked_parametrizations

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}

# What a BatchNorm is made of, also one whose parameters are buffers.
_STATISTICS = ("weight", "bias", "running_mean", "running_var")

# Frozen ones without an attribute for it have this.
_EPS = 1e-5

# A fold is proved on so many samples of the batch.
_PROVING_SAMPLES = 8


class FoldedBatchNorm(nn.Module):
    """Takes the place of a BatchNorm that was folded away: passes its input on, through the modules that it held (an
    activation function, say), and keeps for re-tuning the statistics that the BatchNorm's output had.

    ``weight`` and ``bias`` are the BatchNorm's gamma and beta; ``deviation`` is the standard deviation that its output
    had in training.

    Args:
        normalization: The BatchNorm that was folded.

    Example:
        >>> norm = nn.BatchNorm2d(2, eps=0.0)
        >>> norm.running_var.fill_(4.0)
        tensor([4., 4.])
        >>> FoldedBatchNorm(norm).deviation
        tensor([1., 1.])
    """

    weight: Tensor
    bias: Tensor
    deviation: Tensor

    def __init__(self, normalization: nn.Module) -> None:
        super().__init__()
        gamma, beta = _affine_parameters(normalization)
        self.num_features, self.eps = len(gamma), _eps(normalization)
        variance: Tensor = normalization.running_var  # type: ignore[assignment]
        self.register_buffer("weight", gamma.clone())
        self.register_buffer("bias", beta.clone())
        # This is gamma, but for channels whose variance is not large against eps.
        self.register_buffer("deviation", gamma.abs() * torch.sqrt(variance / (variance + self.eps)))
        for name, child in normalization.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, after the modules that the BatchNorm held."""
        return _after(self, x)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module has the tensors of a BatchNorm: one of PyTorch's, of a class derived from it, or a frozen one of
    any class, whose parameters are buffers.

    Example:
        >>> is_batch_norm(nn.BatchNorm2d(2)), is_batch_norm(nn.LayerNorm(2))
        (True, False)
    """
    if isinstance(module, _BatchNorm):
        return True
    tensors = [getattr(module, name, None) for name in _STATISTICS]
    shapes = {tensor.shape for tensor in tensors if isinstance(tensor, Tensor)}
    are_tensors = all(isinstance(tensor, Tensor) for tensor in tensors)
    return are_tensors and len(shapes) == 1 and len(shapes.pop()) == 1 and not isinstance(module, FoldedBatchNorm)


def _eps(normalization: nn.Module) -> float:
    eps: Any = getattr(normalization, "eps", _EPS)
    try:
        return float(eps)
    except (TypeError, ValueError):
        return _EPS


def _after(normalization: nn.Module, x: Tensor) -> Tensor:
    """What the modules that a BatchNorm holds make of the normalized tensor, in turn."""
    for child in normalization.children():
        x = child(x)
    return x


def prove_folds(
    model: nn.Module, structure: Structure, run: Callable[[], Any]
) -> tuple[tuple[Fold, ...], dict[str, str]]:
    """Find each BatchNorm that can be folded into the layer before it: the structure gives the pairs, and running one
    batch checks the results. The model stays as it is.

    A fold is proved if the layer with the folded parameters reproduces the BatchNorm's output on samples of the batch;
    PyTorch's own convolutions right before its own BatchNorms need no such proof, and without others nothing is run.
    This covers subclasses of the layer and of the BatchNorm, whose own modules then go on after the layer, and tensors
    that are viewed otherwise in between. Parametrized weights count as baked, and layers that share a weight as if each
    had a copy of its own.

    Args:
        model: Must be in eval mode.
        structure: Its structure, as ``record`` has observed it.
        run: Calls the model on one batch.

    Returns:
        The folds, in the order of execution, and the reason for each BatchNorm that is left alone.

    Example:
        >>> from lightning_calibtip.network.observe import record
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)).eval()
        >>> run = lambda: model(torch.ones(1, 1, 4, 4))
        >>> folds, left = prove_folds(model, record(model, run), run)
        >>> folds
        (Fold(layer='0', normalization='1'),)
        >>> left
        {'3': 'no convolution or linear layer right before it'}
        >>> apply_fold(model, folds[0])
        >>> type(model[1]).__name__
        'FoldedBatchNorm'
    """
    modules = dict(model.named_modules())
    tied = find_ties(model, quantizable_layers(model)).tied
    candidates: dict[Fold, nn.Module] = {}
    left = {
        name: "no convolution or linear layer right before it"
        for name in structure.calls_of
        if is_batch_norm(modules[name])
    }
    for name in structure.calls_of:
        if layer_type_of(modules[name]) is None:
            continue
        follower, reason = structure.normalization_after(name, lambda other: is_batch_norm(modules[other]))
        if follower is None:
            for call in structure.calls_of[name] if reason else []:
                readers = [c.name for c in structure.calls if c.name in left and c.reads == call.writes]
                left.update(dict.fromkeys(readers, reason))
            continue
        with torch.no_grad():
            layer = with_baked_parametrizations(modules[name])
        reason = _why_not(layer, modules[follower], tied.get(name)) or _read_elsewhere(modules, structure, name)
        if reason:
            left[follower] = reason
        else:
            candidates[Fold(name, follower)] = layer
    exact = {fold for fold in candidates if _needs_no_proof(modules, structure, fold)}
    unproved = {fold: layer for fold, layer in candidates.items() if fold not in exact}
    if unproved:
        exact |= _reproduced(modules, unproved, run)
    folds = tuple(fold for fold in candidates if fold in exact)
    for fold in candidates:
        if fold in exact:
            del left[fold.normalization]
        else:
            left[fold.normalization] = f"folding it into {fold.layer} changes the output"
    return folds, left


@torch.no_grad()
def apply_fold(model: nn.Module, fold: Fold) -> None:
    """Fold one pair in place: the layer gets the folded weight and a bias, the BatchNorm becomes a ``FoldedBatchNorm``.

    Args:
        model: Holds both; the layer's parameters are plain ones and its own.
        fold: The pair, see ``prove_folds``, which has an example.

    Raises:
        AttributeError: If the model has no module of one of the names.
    """
    layer, normalization = model.get_submodule(fold.layer), model.get_submodule(fold.normalization)
    weight, bias = _folded_parameters(layer, normalization)
    getattr(layer, _weight_name(layer)).copy_(weight)
    layer.bias = nn.Parameter(bias.to(weight.dtype))
    folded = FoldedBatchNorm(normalization).train(normalization.training)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is normalization:
                setattr(parent, child, folded)


def _affine_parameters(normalization: nn.Module) -> tuple[Tensor, Tensor]:
    """``gamma`` and ``beta`` of a BatchNorm, 1 and 0 where it has none."""
    mean: Tensor = normalization.running_mean  # type: ignore[assignment]
    gamma, beta = normalization.weight, normalization.bias
    return (
        gamma.detach() if isinstance(gamma, Tensor) else torch.ones_like(mean),
        beta.detach() if isinstance(beta, Tensor) else torch.zeros_like(mean),
    )


def _folded_parameters(layer: nn.Module, normalization: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias that make ``layer`` alone compute what ``normalization(layer(x))`` computes in eval mode."""
    weight: Tensor = getattr(layer, _weight_name(layer)).detach()
    mean: Tensor = normalization.running_mean  # type: ignore[assignment]
    variance: Tensor = normalization.running_var  # type: ignore[assignment]
    gamma, beta = _affine_parameters(normalization)
    factor = gamma / torch.sqrt(variance + _eps(normalization))
    bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else torch.zeros_like(mean)
    return weight * _output_channels(layer, weight, factor).to(weight.dtype), (bias - mean) * factor + beta


def _output_channels(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """View one factor for each output channel so that it multiplies ``weight`` of ``layer``."""
    if isinstance(layer, _TRANSPOSED):
        # The weight is (in, out / groups, ...), and the inputs of one group are consecutive.
        grouped = factor.view(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
        return grouped.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))
    axis = _registered(layer).channel_axis or 0
    shape = [1] * weight.dim()
    shape[axis] = -1
    return factor.view(shape)


def _registered(layer: nn.Module) -> LayerType:
    layer_type = layer_type_of(layer)
    assert layer_type is not None
    return layer_type


def _weight_name(layer: nn.Module) -> str:
    """Name of a layer's weight; ``""``, which no parameter has, if it has none."""
    return _registered(layer).weight or ""


def _why_not(layer: nn.Module, normalization: nn.Module, embedding: str | None) -> str:
    """Reason why the pair cannot be folded, whatever runs, or ''.

    Args:
        layer: The layer, without parametrizations.
        normalization: The BatchNorm after it.
        embedding: Name of the embedding that has the layer's weight too, if one does.
    """
    mean = normalization.running_mean
    if not isinstance(mean, Tensor):
        return "it has no running statistics"
    weight = layer._parameters.get(_weight_name(layer))
    if not isinstance(weight, Tensor) or "bias" not in layer._parameters:
        return "the layer's weight or bias is not a plain parameter"
    if embedding is not None:
        return f"the layer's weight is also that of the embedding {embedding}"
    groups = layer.groups if isinstance(layer, _TRANSPOSED) else 1
    axis = _registered(layer).channel_axis
    if axis is None or weight.shape[axis] * groups != len(mean):
        return "it normalizes another dimension than the layer's output channels"
    return ""


def _read_elsewhere(modules: Mapping[str, nn.Module], structure: Structure, name: str) -> str:
    """Reason why a layer cannot be folded into where something else computes the model's output with its weight or
    bias, which would then be the folded ones, or ''. Other layers that share a parameter get a copy of their own."""
    for key, parameter in modules[name].named_parameters():
        # What a parametrized weight is computed from has a module of its own, which is asked for it from anywhere.
        is_own = key in modules[name]._parameters
        holders = {other for other, module in modules.items() if is_own and _holds(module, parameter)} | {name}
        begin, storage = parameter.storage_offset(), structure.parameters.get(f"{name}.{key}".removeprefix("."), 0)
        for operator in structure.readers.get(storage, ()):
            if any(structure.calls[index].name in holders for index in operator.scope):
                continue
            # Parameters may be parts of one storage.
            starts = [value.view[0] for value in operator.reads if value.storage == storage]
            if any(begin <= start < begin + parameter.numel() for start in starts) and structure.counts(operator):
                return f"its {key} is also read outside of it, by {operator.name}"
    return ""


def _holds(module: nn.Module, parameter: nn.Parameter) -> bool:
    return any(own is parameter for own in module._parameters.values())


def _needs_no_proof(modules: Mapping[str, nn.Module], structure: Structure, fold: Fold) -> bool:
    """Whether a pair is one of PyTorch's own convolutions and a BatchNorm of its own, as they are, which normalizes the
    very tensor that the convolution returns by its statistics, and all that folding computes is finite."""
    layer, normalization = modules[fold.layer], modules[fold.normalization]
    dims = _CONVOLUTIONS.get(type(layer))
    if dims is None or type(normalization) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return False
    if not (_is_as_it_is(layer) and _is_as_it_is(normalization)):
        return False
    if normalization.training or normalization.num_batches_tracked is None:
        return False
    calls = (structure.calls_of[name] for name in (fold.layer, fold.normalization))
    for producing, reading in zip(*calls, strict=True):
        # Without a dimension of samples, one of another length would be normalized.
        if producing.writes != reading.reads or len(producing.writes[0].view[1]) != dims + 2:
            return False
        # One that is put into training mode for its own call counts its batches.
        if any(operator.name == "add" for operator in structure.operators[reading.start : reading.stop]):
            return False
    return all(is_finite(parameter) for parameter in _folded_parameters(layer, normalization))


def _is_as_it_is(module: nn.Module) -> bool:
    """Whether nothing was added to an object of PyTorch's own class: a method, a hook, a module inside."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._modules
    return not hooked and not any(callable(value) for value in vars(module).values())


def _reproduced(
    modules: Mapping[str, nn.Module], candidates: Mapping[Fold, nn.Module], run: Callable[[], Any]
) -> set[Fold]:
    """Folds whose layer, with the folded parameters, gives the BatchNorm's output on the batch that ``run`` runs.

    Args:
        modules: All modules of the model by name.
        candidates: The folds, each with its layer without parametrizations.
        run: Calls the model on one batch.
    """
    exact = set(candidates)
    entered: dict[Fold, tuple[Any, Any]] = {}

    def remember(fold: Fold) -> Callable[..., None]:
        return lambda module, args, kwargs: entered.__setitem__(fold, (args, kwargs))

    def compare(fold: Fold, layer: nn.Module) -> Callable[..., None]:
        def hook(normalization: nn.Module, inputs: Any, wanted: Tensor) -> None:
            (args, kwargs), wanted = _few_samples(entered.pop(fold), wanted)
            weight, bias = _folded_parameters(layer, normalization)
            kept = dict(layer._parameters)
            layer._parameters.update({_weight_name(layer): nn.Parameter(weight), "bias": nn.Parameter(bias)})
            try:
                got = layer.forward(*args, **kwargs)
                # The layer's output may have been viewed otherwise.
                got = _after(normalization, got.reshape(wanted.shape))
                tolerance = 1e-3 * float(wanted.abs().max()) + 1e-6
                same = got.shape == wanted.shape and float((got - wanted).abs().max()) <= tolerance
            except Exception:
                # Other shapes, or modules inside of the BatchNorm that take something else than its output.
                same = False
            finally:
                layer._parameters.update(kept)
            if not same:
                exact.discard(fold)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for fold, layer in candidates.items():
            remembering = modules[fold.layer].register_forward_pre_hook(remember(fold), with_kwargs=True)
            stack.callback(remembering.remove)
            stack.callback(modules[fold.normalization].register_forward_hook(compare(fold, layer)).remove)
        run()
    return exact


def _few_samples(call: tuple[Any, Any], output: Tensor) -> tuple[tuple[Any, Any], Tensor]:
    """Arguments of a layer and what comes of them, for some samples of the batch only, where all have it as their first
    dimension."""
    leaves = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
    if {leaf.shape[:1] for leaf in leaves} != {output.shape[:1]} or not output.dim():
        return call, output
    few: tuple[Any, Any] = tree_map(lambda leaf: leaf[:_PROVING_SAMPLES] if isinstance(leaf, Tensor) else leaf, call)
    return few, output[:_PROVING_SAMPLES]
