import pytest
import torch

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
