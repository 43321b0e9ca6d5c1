"""Importance of each element of a unit's output: by the loss's gradient (Fisher weighting; BRECQ: Li et al. 2021), and
none where it belongs to padding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..calibration.calibration_set import CalibrationSet
from ..calibration.divergences import Divergence, divergence_of
from ..calibration.recording import Recording
from ..calibration.replay import Replay
from ..network.network import QuantizedNetwork
from ..quantization.tokens import token_mask
from .objectives import Objective
from .units import Unit

# ``loss(output, batch)`` is a scalar, from the model's output for a calibration batch.
ReconstructionLoss = Callable[[Any, Any], Tensor]

# Keeps an output that does not matter to the loss at all from dividing by zero.
_SMALLEST = 1e-30


def measure_importance(
    network: QuantizedNetwork,
    calibration: CalibrationSet,
    units: Sequence[Unit],
    stream: Replay,
    loss: ReconstructionLoss | Divergence | Mapping[str, Any] | str,
    seed: int = 0,
) -> dict[str, Recording]:
    """Weights of the elements of each unit's output, in one pass forward and backward through the float model.

    An element's weight is half 1, so that what the loss does not see is not left to chance, and half its squared
    gradient, the diagonal of the Fisher matrix, over the mean of the call (padding left out): a mean and a sum over the
    batch come to the same. Gradients are those of what the module returns, so before an activation that follows it.

    Args:
        network: Calibrated network.
        calibration: Calibration set.
        units: Units of the network.
        stream: Replay whose store keeps the recordings.
        loss: ``loss(output, batch)`` gives a scalar from the model's output for a calibration batch; or a divergence,
            which needs no labels, or its name: see ``Divergence.probe``.
        seed: Random seed of what a divergence draws.

    Returns:
        For each unit by its name, a list of tensors for each of its calls.

    Raises:
        ValueError: If the loss is not a finite scalar that depends on the model's output.

    Example:
        See ``adaquant``, whose option ``loss`` leads here.
    """
    value_of = _labelled(loss, calibration) if callable(loss) else _probing(loss, network, calibration, seed)
    found = {unit.name: stream.recording(unit.name, unit.prefers_channels_last) for unit in units}
    with network.quantized(False), torch.enable_grad():
        for index in range(len(calibration)):
            # What the graph starts from: no parameter needs a gradient.
            anchor = torch.zeros((), requires_grad=True)
            with _tracing(units, anchor) as outputs:
                value = value_of(calibration.run(index), index)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise ValueError(
                    "loss(output, batch) must return a scalar tensor that depends on the model's output, got "
                    f"{type(value).__name__ if not isinstance(value, Tensor) else f'shape {tuple(value.shape)}'}."
                )
            if not bool(torch.isfinite(value)):
                raise ValueError(f"loss(output, batch) is {value.item()} for calibration batch {index}.")
            value.backward(inputs=[anchor])
            tokens = calibration.tokens(index)
            for unit in units:
                for gradients in outputs[unit.name]:
                    counts = token_weights(unit, gradients, tokens, None)
                    found[unit.name].append(_weights(gradients, counts))
    return found


def _labelled(loss: ReconstructionLoss, calibration: CalibrationSet) -> Callable[[Any, int], Tensor]:
    """The user's loss of an output for the batch of an index."""
    return lambda output, index: loss(output, calibration.batches[index])


def _probing(
    loss: Divergence | Mapping[str, Any] | str, network: QuantizedNetwork, calibration: CalibrationSet, seed: int
) -> Callable[[Any, int], Tensor]:
    """What a divergence probes of an output for the batch of an index."""
    divergence = divergence_of(loss)
    targets, generator = divergence.targets(network, calibration), torch.Generator().manual_seed(seed)
    return lambda output, index: divergence.probe(output, targets[index], calibration.tokens(index), generator)


def token_weights(
    unit: Unit,
    output: Any,
    tokens: Tensor | None,
    importance: Sequence[Tensor] | None,
    objective: Objective | None = None,
) -> list[Tensor]:
    """Weights of the floating-point tensors of a unit's output: 0 for tokens that do not count, else 1.

    Args:
        unit: The unit.
        output: Its output at one call.
        tokens: Which tokens of the batch count, bool, shape (batch, positions) or (rows,); None if all do.
        importance: Weights that these are multiplied by; None for 1.
        objective: Objective that may weigh rows; None for one that does not.

    Returns:
        A tensor for each such tensor, broadcastable to it, with as many rows.

    Example:
        >>> unit = Unit("identity", nn.Identity(), (), None)
        >>> token_weights(unit, torch.ones(2, 3), None, None)
        [tensor([[1.],
                [1.]])]
    """
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    weights = []
    for leaf in leaves:
        mask = token_mask(leaf.shape, tokens, unit.output_token_axes)
        weights.append(
            leaf.new_ones([*leaf.shape[:1], *[1] * (leaf.dim() - 1)]) if mask is None else mask.to(leaf.dtype)
        )
        rows = None if objective is None else objective.row_weights(leaf)
        if rows is not None:
            weights[-1] = weights[-1] * rows.to(leaf).view(-1, *[1] * (leaf.dim() - 1))
    if importance is None:
        return weights
    return [weight * given.to(weight.device) for weight, given in zip(weights, importance, strict=True)]


def _weights(gradients: Sequence[Tensor], counts: Sequence[Tensor]) -> list[Tensor]:
    """A list as long as ``gradients``, with a mean of 1 over the elements whose ``counts`` are not 0."""
    squares = [gradient.float().square() for gradient in gradients]
    pairs = list(zip(squares, counts, strict=True))
    total = sum(float((square * count).sum()) for square, count in pairs)
    number = sum(float(count.sum()) * square.numel() / count.numel() for square, count in pairs)
    mean = max(total / max(number, 1), _SMALLEST)
    return [0.5 + square * (0.5 / mean) for square in squares]


@contextmanager
def _tracing(units: Sequence[Unit], anchor: Tensor) -> Iterator[dict[str, list[list[Tensor]]]]:
    """Inside, the gradients of the units' outputs, call by call, arrive in what is given once a backward pass runs."""
    gradients: dict[str, list[list[Tensor]]] = {unit.name: [] for unit in units}

    def tracing(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            call: list[Tensor] = []
            gradients[name].append(call)

            def trace(leaf: Any) -> Any:
                if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                    return leaf
                leaf = leaf + anchor.to(leaf.device, leaf.dtype)
                call.append(torch.zeros_like(leaf, requires_grad=False))
                place = len(call) - 1
                leaf.register_hook(lambda gradient: call.__setitem__(place, gradient.detach()))
                return leaf

            return tree_map(trace, output)

        return hook

    with ExitStack() as stack:
        for unit in units:
            stack.callback(unit.module.register_forward_hook(tracing(unit.name)).remove)
        yield gradients
