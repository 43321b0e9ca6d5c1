"""Folding of BatchNorm into the layer before it (Jacob et al. 2018, section 3.2), where running has proved the pair."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .kinds import layer_kind
from .structure import Structure

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class FoldedBatchNorm(nn.Module):
    """Stands where a BatchNorm was folded away: passes its input on, and remembers for re-tuning what came out of it.

    ``weight`` and ``bias`` are its gamma and beta; ``deviation`` is the standard deviation that its output had in
    training.

    Args:
        normalization: The BatchNorm that was folded.
    """

    weight: Tensor
    bias: Tensor
    deviation: Tensor

    def __init__(self, normalization: _BatchNorm) -> None:
        super().__init__()
        self.num_features, self.eps = normalization.num_features, normalization.eps
        gamma, beta = affine_parameters(normalization)
        variance: Tensor = normalization.running_var  # type: ignore[assignment]
        self.register_buffer("weight", gamma.clone())
        self.register_buffer("bias", beta.clone())
        # gamma, but for channels whose variance is not large against eps.
        self.register_buffer("deviation", gamma.abs() * torch.sqrt(variance / (variance + self.eps)))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


@dataclass(frozen=True)
class Fold:
    """A BatchNorm that was folded into a layer, both by their full names."""

    layer: str
    normalization: str


def affine_parameters(normalization: _BatchNorm) -> tuple[Tensor, Tensor]:
    """``gamma`` and ``beta`` of a BatchNorm, 1 and 0 where it has none."""
    mean: Tensor = normalization.running_mean  # type: ignore[assignment]
    gamma = torch.ones_like(mean) if normalization.weight is None else normalization.weight.detach()
    beta = torch.zeros_like(mean) if normalization.bias is None else normalization.bias.detach()
    return gamma, beta


def output_channels(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """View one factor for each output channel so that it multiplies ``weight`` of ``layer``."""
    if isinstance(layer, _TRANSPOSED):
        # The weight is (in, out / groups, ...), and the inputs of one group are consecutive.
        grouped = factor.view(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
        return grouped.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))
    return factor.view(-1, *[1] * (weight.dim() - 1))


def folded_parameters(layer: nn.Module, normalization: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias that make ``layer`` alone compute what ``normalization(layer(x))`` computes in eval mode."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    mean: Tensor = normalization.running_mean  # type: ignore[assignment]
    variance: Tensor = normalization.running_var  # type: ignore[assignment]
    gamma, beta = affine_parameters(normalization)
    factor = gamma / torch.sqrt(variance + normalization.eps)
    bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else torch.zeros_like(mean)
    return weight * output_channels(layer, weight, factor).to(weight.dtype), (bias - mean) * factor + beta


def _why_not(layer: nn.Module, normalization: nn.Module) -> str:
    """Reason why the pair cannot be folded, whatever runs, or ''."""
    assert isinstance(normalization, _BatchNorm)
    if type(normalization).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return f"{type(normalization).__name__} has a forward of its own"
    if normalization.running_mean is None:
        return "it has no running statistics"
    if not isinstance(layer._parameters.get("weight"), Tensor) or "bias" not in layer._parameters:
        return "the layer's weight or bias is not a plain parameter"
    groups = layer.groups if isinstance(layer, _TRANSPOSED) else 1
    kind = layer_kind(layer)
    weight = layer._parameters["weight"]
    assert weight is not None
    axis = None if kind is None else kind.channel_axis
    if axis is None or weight.shape[axis] * groups != normalization.num_features:
        return "it normalizes another dimension than the layer's output channels"
    return ""


def fold_batch_norm(
    model: nn.Module, structure: Structure, run: Callable[[], Any]
) -> tuple[list[Fold], dict[str, str]]:
    """Fold each BatchNorm into the layer before it where the structure proves the pair, and check the result on one
    batch.

    A fold is kept if the layer with the folded parameters reproduces the BatchNorm's output on the batch (this covers
    subclasses with a ``forward`` of their own that ignores the bias, say).

    Args:
        model: Changed in place; must be in eval mode.
        structure: What ``observe_structure`` has seen of ``model``.
        run: Calls the model on one batch.

    Returns:
        The folds made, in the order of execution, and the BatchNorms left alone with the reason.
    """
    modules = dict(model.named_modules())
    candidates: list[Fold] = []
    left = {
        name: "no convolution or linear layer right before it"
        for name in structure.calls_of
        if isinstance(modules[name], _BatchNorm)
    }
    for name in structure.calls_of:
        if layer_kind(modules[name]) is None:
            continue
        follower, reason = structure.normalization_after(name, lambda other: isinstance(modules[other], _BatchNorm))
        if follower is None:
            for call in structure.calls_of[name] if reason else []:
                readers = [c.name for c in structure.calls if c.name in left and c.reads == call.writes]
                left.update(dict.fromkeys(readers, reason))
        elif reason := _why_not(modules[name], modules[follower]):
            left[follower] = reason
        else:
            candidates.append(Fold(name, follower))
    exact = _reproduced(model, candidates, run)
    folds = [fold for fold in candidates if fold in exact]
    for fold in folds:
        apply_fold(model, fold)
        del left[fold.normalization]
    left.update(
        {f.normalization: f"folding it into {f.layer} changes the output" for f in candidates if f not in exact}
    )
    return folds, left


def _reproduced(model: nn.Module, candidates: list[Fold], run: Callable[[], Any]) -> set[Fold]:
    """Folds whose layer, with the folded parameters, gives the BatchNorm's output on the batch that ``run`` runs."""
    exact = set(candidates)
    entered: dict[Fold, tuple[Any, Any]] = {}

    def remember(fold: Fold) -> Callable[..., None]:
        return lambda module, args, kwargs: entered.__setitem__(fold, (args, kwargs))

    def compare(fold: Fold, layer: nn.Module) -> Callable[..., None]:
        def hook(normalization: _BatchNorm, inputs: Any, wanted: Tensor) -> None:
            args, kwargs = entered.pop(fold)
            weight, bias = folded_parameters(layer, normalization)
            kept = dict(layer._parameters)
            layer._parameters.update(weight=nn.Parameter(weight), bias=nn.Parameter(bias))
            try:
                got = layer.forward(*args, **kwargs)
            finally:
                layer._parameters.update(kept)
            tolerance = 1e-3 * float(wanted.abs().max()) + 1e-6
            if got.shape != wanted.shape or not float((got - wanted).abs().max()) <= tolerance:
                exact.discard(fold)

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as stack, torch.no_grad():
        for fold in candidates:
            layer, normalization = modules[fold.layer], modules[fold.normalization]
            stack.callback(layer.register_forward_pre_hook(remember(fold), with_kwargs=True).remove)
            stack.callback(normalization.register_forward_hook(compare(fold, layer)).remove)
        run()
    return exact


@torch.no_grad()
def apply_fold(model: nn.Module, fold: Fold) -> None:
    """Fold one pair in place: the layer gets the folded weight and a bias, the BatchNorm becomes a ``FoldedBatchNorm``.

    Raises:
        AttributeError: If the model has no module of one of the names.
    """
    layer, normalization = model.get_submodule(fold.layer), model.get_submodule(fold.normalization)
    assert isinstance(normalization, _BatchNorm)
    weight, bias = folded_parameters(layer, normalization)
    layer.weight.copy_(weight)  # type: ignore[operator]
    layer.bias = nn.Parameter(bias.to(weight.dtype))
    folded = FoldedBatchNorm(normalization).train(normalization.training)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is normalization:
                setattr(parent, child, folded)
