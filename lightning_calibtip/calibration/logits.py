"""Distance of a quantized model's outputs from the float model's: the unlabelled loss of tuning and allocation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ranks
from ..network.network import QuantizedNetwork
from .calibration_set import CalibrationSet, named_logits

# Prefixes of the names of outputs whose classes are the positions of the input.
POSITION_LOGITS = ("start", "end")

# Of a sample with more logits than this (a text, over a large vocabulary) only some positions are kept and compared.
_MOST_LOGITS = 2**20


@torch.no_grad()
def float_logits(
    network: QuantizedNetwork, calibration: CalibrationSet, run: Callable[[int], Any] | None = None
) -> list[list[Tensor]]:
    """Logits of the float model. See ``measure_divergences``.

    Of a sample with more than a million logits only some positions are kept, at even distances.

    Args:
        network: Network with its float weights.
        calibration: Calibration set.
        run: ``run(index)`` gives the output for a batch; that of the calibration set if None.

    Returns:
        For each batch, a list of its output tensors.
    """
    run = run or calibration.run
    with network.quantized(False):
        return [_selected(run(index), calibration.tokens(index)) for index in range(len(calibration))]


def _selected(output: Any, tokens: Tensor | None) -> list[Tensor]:
    """The logits of a batch, at some positions only where there are too many."""
    kept = []
    for _, logits in named_logits(output):
        index = _positions(logits, tokens)
        kept.append(logits.detach() if index is None else _gather(logits.detach(), index))
    return kept


def _positions(logits: Tensor, tokens: Tensor | None) -> Tensor | None:
    """Positions to compare, at even distances among those that count, shape (samples, n); None for all."""
    if logits.dim() != 3 or logits[0].numel() <= _MOST_LOGITS or logits.shape[1] == 1:
        return None
    samples, positions, classes = logits.shape
    counts = torch.ones(samples, positions, device=logits.device)
    if tokens is not None and tokens.shape == counts.shape:
        counts = tokens.to(counts)
    # Those that count come first, in their order.
    order = counts.argsort(dim=1, descending=True, stable=True)
    share = torch.linspace(0, 1, max(1, _MOST_LOGITS // classes), device=logits.device)
    ranks = share * (counts.sum(1, keepdim=True) - 1).clamp_min(0)
    return order.gather(1, ranks.round().long())


def _gather(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def paired_logits(
    output: Any, target: list[Tensor], tokens: Tensor | None = None
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """What is compared of the outputs of a batch: the name of each tensor, the logits, the float ones, and which tokens
    count.

    Args:
        output: Output of the quantized model.
        target: Float output tensors of the same batch, whole or as ``float_logits`` keeps them.
        tokens: Which tokens count, bool, shape (samples, positions); all if None.

    Example:
        >>> [name for name, *_ in paired_logits({"logits": torch.zeros(2, 3)}, [torch.zeros(2, 3)])]
        ['logits']
    """
    for (name, logits), wanted in zip(named_logits(output), target, strict=True):
        index = None if logits.shape == wanted.shape else _positions(logits, tokens)
        if index is None:
            yield name, logits, wanted, tokens
            continue
        counts = None
        if tokens is not None and tokens.shape == logits.shape[:2]:
            counts = tokens.gather(1, index)
        yield name, _gather(logits, index), wanted, counts


def sample_divergences(output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
    """Divergence of each sample's quantized outputs from its float ones, in nats, summed over output tensors.

    For an output of class logits this is the Kullback-Leibler divergence KL(float || quantized), averaged over
    positions; classes run along the last dimension, or along dimension 1 of tensors with four or more (segmentation).
    For an output of one value a sample (regression, a single logit) it is the squared error over twice the float
    output's mean square, which is the divergence of two Gaussians of that variance.

    Tokens that do not count are left out of the positions that are averaged over, and of the classes where these are
    the positions themselves (outputs named ``start...`` and ``end...``, of an answer).

    Args:
        output: Output of the quantized model.
        target: Float output tensors of the same batch, the samples along the first dimension.
        tokens: Which tokens count, bool, shape (samples, positions), or which rows do, shape (rows,); all if None.

    Returns:
        Divergences, float32, shape (samples,); only of the rows that count.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]])
        >>> sample_divergences(logits, [logits])
        tensor([0.])
    """
    return over_outputs(
        [
            _divergences(logits.float(), wanted.float(), counts, name.startswith(POSITION_LOGITS))
            for name, logits, wanted, counts in paired_logits(output, target, tokens)
        ]
    )


def _divergences(logits: Tensor, wanted: Tensor, tokens: Tensor | None, of_positions: bool) -> Tensor:
    if tokens is not None and of_positions and logits.shape == tokens.shape:
        lowest = torch.finfo(torch.float32).min
        logits, wanted = logits.masked_fill(~tokens, lowest), wanted.masked_fill(~tokens, lowest)
    axis = class_axis(logits)
    if logits.dim() == 1 or logits.shape[axis] == 1:
        lost = (logits - wanted).square() / (2 * wanted.square().mean().clamp_min(1e-12))
    else:
        student, teacher = F.log_softmax(logits, axis), F.log_softmax(wanted, axis)
        lost = F.kl_div(student, teacher, reduction="none", log_target=True).sum(axis)
    return over_positions(lost, tokens, logits)


def class_axis(logits: Tensor) -> int:
    """Dimension that classes run along: the last one, or dimension 1 of tensors with four or more (segmentation).

    Example:
        >>> class_axis(torch.zeros(2, 10)), class_axis(torch.zeros(2, 10, 8, 8))
        (-1, 1)
    """
    return 1 if logits.dim() >= 4 else -1


def over_outputs(lost: Sequence[Tensor]) -> Tensor:
    """Sum of what samples have lost in each output; where outputs are of other samples each (of several kinds of
    nodes), one after the other.

    Args:
        lost: Losses of each output, shape (samples,); at least one.

    Example:
        >>> one, two, three = torch.ones(1), torch.ones(2), 3 * torch.ones(2)
        >>> over_outputs([two, three]), over_outputs([one, three])
        (tensor([4., 4.]), tensor([1., 3., 3.]))
    """
    alike = len({len(each) for each in lost}) == 1
    return torch.stack(list(lost)).sum(0) if alike else torch.cat(list(lost))


def over_positions(lost: Tensor, tokens: Tensor | None, logits: Tensor) -> Tensor:
    """Mean of what each sample has lost over those of its positions that count.

    Args:
        lost: Losses of a batch, shape (samples,) or (samples, positions, ...).
        tokens: Which tokens count, bool, shape (samples, positions), or which samples (nodes of a graph), shape
            (samples,); all if None.
        logits: The logits that were compared.

    Returns:
        Losses, shape (samples,), of those samples that count.

    Example:
        >>> lost, tokens = torch.tensor([[1.0, 5.0]]), torch.tensor([[True, False]])
        >>> over_positions(lost, tokens, torch.zeros(1, 2, 3))
        tensor([1.])
    """
    if tokens is not None and tokens.dim() == 1 and len(lost) == len(tokens):
        lost = lost[tokens]
    elif tokens is not None and logits.dim() > 2 and lost.shape == tokens.shape:
        return (lost * tokens).sum(1) / tokens.sum(1).clamp_min(1)
    return lost.flatten(1).mean(1) if lost.dim() > 1 else lost


def kl_divergence(output: Any, target: list[Tensor], tokens: Tensor | None = None) -> Tensor:
    """Mean of ``sample_divergences`` over the samples.

    Args:
        output: Output of the quantized model.
        target: Float output tensors of the same batch.
        tokens: Which tokens count, bool, shape (samples, positions); all if None.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 1.0]]), [torch.tensor([[0.0, 2.0]])]).item() > 0
        True
    """
    return sample_divergences(output, target, tokens).mean()


@torch.no_grad()
def measure_divergences(
    calibration: CalibrationSet,
    targets: list[list[Tensor]],
    indices: Iterable[int],
    run: Callable[[int], Any] | None = None,
    of_samples: Callable[[Any, list[Tensor], Tensor | None], Tensor] = sample_divergences,
) -> Tensor:
    """Divergences of the model, as it is now, from its float outputs; of several ranks each runs its share of the
    batches.

    Args:
        calibration: Calibration set, which runs the model.
        targets: Float output tensors of each batch, see ``float_logits``.
        indices: Batches to measure on.
        run: See ``float_logits``.
        of_samples: Which divergence is measured, see ``Divergence.of_samples``.

    Returns:
        Divergence of each sample of these batches, shape (samples,).

    Example:
        >>> calibration = CalibrationSet(lambda batch, index: batch)
        >>> calibration.append(torch.tensor([[0.0, 1.0]]))
        >>> measure_divergences(calibration, [[torch.tensor([[0.0, 1.0]])]], [0])
        tensor([0.])
    """
    run = run or calibration.run

    def divergences(index: int) -> Tensor:
        return of_samples(run(index), targets[index], calibration.tokens(index))

    found = ranks.share(list(indices), divergences)
    return torch.cat([of_batch.to(targets[0][0].device) for of_batch in found])
