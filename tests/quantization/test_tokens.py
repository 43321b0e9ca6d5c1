import pytest
import torch

from lightning_calibtip.quantization.kinds import Operand
from lightning_calibtip.quantization.observers import MinMaxObserver
from lightning_calibtip.quantization.quantizer import Quantizer
from lightning_calibtip.quantization.tokens import token_mask

TOKENS = torch.tensor([[True, True, True, False], [True, False, False, False]])


@pytest.mark.parametrize(
    "shape,axes",
    [((2, 4, 5), (1,)), ((2, 3, 4, 5), (2,)), ((2, 3, 5, 4), (3,)), ((2, 3, 4, 4), (2, 3)), ((8, 5), (1,))],
)
def test_exactly_the_elements_of_padding_are_masked(shape, axes):
    mask = token_mask(shape, TOKENS, axes)
    full = mask.expand(shape)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        if len(shape) == 2:
            wanted = bool(TOKENS.flatten()[place[0]])
        else:
            wanted = all(bool(TOKENS[place[0], place[axis]]) for axis in axes)
        assert bool(full[tuple(place)]) == wanted


@pytest.mark.parametrize(
    "shape,axes", [((2, 5), (1,)), ((2, 4), (1,)), ((2, 3, 5), (1,)), ((3, 4, 5), (1,)), ((2, 4, 4), ())]
)
def test_what_does_not_run_over_tokens_counts_wholly(shape, axes):
    """Pooled features, other sequences, and a width that happens to be the number of tokens."""
    assert token_mask(shape, TOKENS, axes) is None
    assert token_mask((2, 4, 5), None, (1,)) is None


def test_a_quantizer_observes_only_tokens_that_count():
    quantizer = Quantizer("x", 8, symmetric=False, operand=Operand(token_axes=(2,)))
    quantizer.observer, quantizer.observing, quantizer.tokens = MinMaxObserver(), True, TOKENS
    x = torch.where(TOKENS[:, None, :, None], torch.linspace(-1, 2, 48).view(2, 2, 4, 3), torch.tensor(99.0))
    quantizer(x)
    low, high = quantizer.observer.compute_range(8, False)
    inside = x[x < 99]
    assert (float(low), float(high)) == (float(inside.min()), float(inside.max()))
