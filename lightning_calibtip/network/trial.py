"""Never worse: try a change of some layers, judge it, and keep it or put the layers back."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import QuantizedLayer
from .states import LayerState

Judge = Callable[[], Tensor | float]
IsBetter = Callable[[Tensor, Tensor], bool]


@dataclass
class Trial:
    """An attempt to change some layers, see ``trial``.

    Args:
        before: Losses before the attempt, one for each sample; empty without a judge.
        tried: Losses that the attempt came to; NaN if it failed or broke off.
        after: Losses of the state that was kept.
        kept: Whether the change was kept.
        note: Why it was not; ``""`` if it was.

    Example:
        See ``trial``.
    """

    before: Tensor
    tried: Tensor
    after: Tensor
    kept: bool = True
    note: str = ""

    def fail(self, reason: str) -> None:
        """Give the attempt up, whatever it would be judged: the layers are put back when the context ends."""
        self.kept, self.note = False, reason


def falls_on_average(before: Tensor, after: Tensor) -> bool:
    """Whether the mean loss falls; never where it became NaN.

    Example:
        >>> falls_on_average(torch.tensor([1.0, 3.0]), torch.tensor([1.5, 2.0]))
        True
    """
    return bool(after.mean() < before.mean())


@contextmanager
def trial(
    layers: Iterable[QuantizedLayer], judge: Judge | None = None, is_better: IsBetter = falls_on_average
) -> Iterator[Trial]:
    """Inside, the layers may be changed in any way; at the end they keep the change only if it makes the model better.

    The layers are put back exactly where the body raises, where it calls ``Trial.fail``, and where the judge does not
    find them better than before.

    Args:
        layers: Quantized layers, in their present states.
        judge: Gives the loss of each held-out sample (shape (n,), or a number) for the layers as they are at the time
            of the call. It is asked once before the body and once after it. None keeps whatever does not raise.
        is_better: ``is_better(before, after)`` decides from these losses; by default, the mean must fall.

    Yields:
        The trial, complete once the context has ended.

    Example:
        >>> from torch import nn
        >>> from lightning_calibtip.network.network import QuantizedNetwork
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> network = QuantizedNetwork(model.eval(), QuantizationScheme())
        >>> network.prepare(lambda: model(torch.ones(1, 2)))
        >>> layer = network.layers["0"]
        >>> with torch.no_grad(), trial([layer], judge=lambda: float(layer.bias.abs().sum())) as attempt:
        ...     _ = layer.bias.add_(100.0)
        >>> attempt.kept, bool(layer.bias.abs().max() < 1)
        (False, True)
    """
    saved = [(layer, layer.save()) for layer in layers]
    before = _losses(judge)
    attempt = Trial(before, torch.full_like(before, torch.nan), before)
    try:
        yield attempt
        if attempt.kept:
            attempt.tried = _losses(judge)
            if judge is not None and not is_better(before, attempt.tried):
                attempt.fail(f"the held-out loss did not fall ({before.mean():.3g} to {attempt.tried.mean():.3g})")
    except BaseException:
        _restore(saved)
        raise
    if attempt.kept:
        attempt.after = attempt.tried
    else:
        _restore(saved)


def _losses(judge: Judge | None) -> Tensor:
    if judge is None:
        return torch.empty(0)
    # Autocast keeps casts of parameters, which may have changed since.
    torch.clear_autocast_cache()
    return torch.as_tensor(judge(), dtype=torch.float32).detach().reshape(-1)


def _restore(saved: list[tuple[QuantizedLayer, LayerState]]) -> None:
    for layer, state in saved:
        layer.restore(state)
