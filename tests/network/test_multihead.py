"""torch.nn.MultiheadAttention by modules: the same function, each of its products quantized."""

import math
from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import nn

from lightning_calibtip import Calibration, QuantizationModule
from lightning_calibtip.network.multihead import (
    SplitMultiheadAttention,
    possible_projections,
    split_multihead_attention,
)
from tests.networks import as_loader

# Two orders of summation in single precision.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"kdim": 6, "vdim": 4},
    {"kdim": 6, "vdim": 4, "bias": False, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
]


def calibrated(net, make_trainer, batches, **options):
    module = QuantizationModule(net, **options)
    make_trainer(Calibration()).fit(module, as_loader(*batches))
    return module


def make(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, **options).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def inputs(attention: nn.MultiheadAttention, batch: int = 4):
    shapes = ((3, 8), (5, attention.kdim), (5, attention.vdim))
    return [torch.randn(batch, *shape).transpose(0, 0 if attention.batch_first else 1) for shape in shapes]


def split(attention: nn.MultiheadAttention) -> SplitMultiheadAttention:
    copy = deepcopy(attention)
    split_multihead_attention(copy)
    assert isinstance(copy, SplitMultiheadAttention)
    return copy


def masks():
    """Attention and padding masks of all kinds, none of which hides the first key."""
    generator = torch.Generator().manual_seed(0)

    def hidden(*shape):
        mask = torch.rand(*shape, generator=generator) < 0.4
        mask[..., 0] = False
        return mask

    attention = [None, hidden(3, 5), torch.randn(3, 5, generator=generator), hidden(8, 3, 5)]
    padding = [None, hidden(4, 5), torch.randn(4, 5, generator=generator)]
    return product(attention, padding)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_computes_what_pytorchs_does(options):
    attention = make(**options)
    modules, (query, key, value) = split(attention), inputs(attention)
    for attn_mask, key_padding_mask in masks():
        for kinds in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            wanted, given = (
                module(query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask, **kinds)
                for module in (attention, modules)
            )
            torch.testing.assert_close(given, wanted, **CLOSE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_computes_samples_without_a_batch(options):
    attention = make(**options)
    query, key, value = (x[:, 0] if not attention.batch_first else x[0] for x in inputs(attention))
    mask, padding = torch.rand(3, 5) < 0.0, torch.tensor([False, False, True, False, True])
    for kinds in ({}, {"need_weights": False}, {"attn_mask": mask, "key_padding_mask": padding}):
        wanted, given = attention(query, key, value, **kinds), split(attention)(query, key, value, **kinds)
        torch.testing.assert_close(given, wanted, **CLOSE)


def test_causal_hints_need_the_mask():
    attention = make(batch_first=True)
    x = torch.randn(2, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    wanted, given = (
        module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        for module in (attention, split(attention))
    )
    torch.testing.assert_close(given, wanted, **CLOSE)
    with pytest.raises(RuntimeError, match="attn_mask, which is None"):
        split(attention)(x, x, x, is_causal=True)


def test_a_query_without_keys_attends_to_nothing_and_has_finite_gradients():
    attention = split(make(batch_first=True))
    x = torch.randn(2, 5, 8, requires_grad=True)
    padding = torch.tensor([[True] * 5, [False] * 5])
    output, weights = attention(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(output[0], attention.out_proj.bias.expand(5, 8))
    assert not weights[0].any() and torch.allclose(weights[1].sum(-1), torch.ones(5))
    output.sum().backward()
    assert x.grad.isfinite().all()


def test_state_dicts_of_pytorchs_attention_load():
    for options in OPTIONS:
        attention = make(**options)
        modules = split(attention)
        for parameter in modules.parameters():
            nn.init.zeros_(parameter)
        modules.load_state_dict(attention.state_dict())
        for name, tensor in split(attention).state_dict().items():
            assert torch.equal(modules.state_dict()[name], tensor)


class Derived(nn.MultiheadAttention):
    """Its forward may differ."""


def own_forward() -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(8, 2)
    attention.forward = nn.MultiheadAttention.forward.__get__(attention)
    return attention


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "attention",
    [
        Derived(8, 2),
        nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
        nn.utils.spectral_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
        own_forward(),
    ],
)
def test_attention_that_may_compute_otherwise_is_left_alone(attention):
    kind, names = type(attention), list(attention.state_dict())
    assert possible_projections(attention) == []
    split_multihead_attention(attention)
    assert type(attention) is kind and list(attention.state_dict()) == names


def test_packed_parameters_can_still_be_read():
    for options in OPTIONS:
        attention = make(**options)
        modules = split(attention)
        for name in ("in_proj_weight", "in_proj_bias"):
            given, wanted = getattr(modules, name), getattr(attention, name)
            assert given is wanted is None or torch.equal(given, wanted)


def test_masks_of_whole_numbers_are_refused():
    x = torch.randn(2, 5, 8)
    with pytest.raises(TypeError, match="must be of bool or of floating point"):
        split(make(batch_first=True))(x, x, x, key_padding_mask=torch.ones(2, 5, dtype=torch.uint8))


class OwnLayer(nn.Module):
    """Reads the hint that PyTorch's encoder passes on, and the mask in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.self_attn = nn.Linear(8, 24), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        q, k, v = self.linear(src).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def test_encoders_of_other_layers_stay_as_they_are():
    net = nn.TransformerEncoder(OwnLayer(), 2, enable_nested_tensor=False).eval()
    modules = deepcopy(net)
    split_multihead_attention(modules)
    x, mask = torch.randn(2, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    assert type(modules) is nn.TransformerEncoder
    torch.testing.assert_close(modules(x, mask=mask), net(x, mask=mask))


@torch.no_grad()
def test_masks_of_bool_reach_the_layers_of_an_encoder():
    net = encoder()
    modules, x, mask = deepcopy(net), torch.randn(2, 5, 16), torch.ones(5, 5, dtype=torch.bool).triu(1)
    split_multihead_attention(modules)
    torch.testing.assert_close(modules(x, mask=mask), net(x, mask=mask), **CLOSE)


def test_the_float_model_is_known_by_its_own_parameters(make_trainer):
    """Not by those of the split one: sizes are compared with what the user has."""
    first, second = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    second.in_proj_weight = first.in_proj_weight
    net = nn.ModuleList([first, second])
    wanted = sum(parameter.nbytes for parameter in net.parameters())
    assert QuantizationModule(net).network.float_bytes == wanted


def encoder(norm: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if norm else None)
    for parameter in net.parameters():
        # The biases are 0 otherwise.
        nn.init.normal_(parameter, std=0.3)
    return net.eval()


def test_an_encoder_of_pytorch_is_quantized_whole(make_trainer):
    net, x = nn.Sequential(encoder(), nn.Linear(16, 3)).eval(), torch.randn(8, 6, 16)
    module = calibrated(deepcopy(net), make_trainer, x.split(2))
    assert not module.network.plan.float_matmuls and not module.network.plan.float_layers
    # Four projections, two products and two linear layers of each encoder layer, and the head.
    assert len(module.network.layers) == 2 * 8 + 1
    first = module.network.layers["0.layers.0.self_attn.q_proj"]
    assert first.tensors == module.network.layers["0.layers.0.self_attn.v_proj"].tensors
    with torch.no_grad():
        torch.testing.assert_close(module(x), net(x), rtol=0.1, atol=0.1)
        with module.quantized(False):
            torch.testing.assert_close(module(x), net(x), **CLOSE)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@torch.no_grad()
def test_an_encoder_that_packs_its_tokens_computes_the_same_without(norm, aligned):
    net, x = encoder(norm), torch.randn(4, 6, 16)
    padding = torch.arange(6) >= torch.tensor([[6], [4]] * 2)
    if not aligned:
        padding = padding.flip(1)
    modules = deepcopy(net)
    split_multihead_attention(modules)
    for mask in (None, nn.Transformer.generate_square_subsequent_mask(6) if aligned else None):
        given, wanted = (module(x, mask, src_key_padding_mask=padding) for module in (modules, net))
        torch.testing.assert_close(given, wanted, **CLOSE)
    torch.testing.assert_close(modules(x), net(x), **CLOSE)


def test_padding_of_a_quantized_encoder(make_trainer):
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, x):
            return self.encoder(x, src_key_padding_mask=torch.arange(6) >= torch.tensor([[6], [4]]))

    net, x = Padded().eval(), torch.randn(8, 6, 16)
    module = calibrated(deepcopy(net), make_trainer, x.split(2))
    assert len(module.network.layers) == 16
    with torch.no_grad():
        wanted = net(x[:2])
        with module.quantized(False):
            torch.testing.assert_close(module(x[:2]), wanted, **CLOSE)
        torch.testing.assert_close(module(x[:2]), wanted, rtol=0.1, atol=0.1)


class DerivedEncoder(nn.TransformerEncoder):
    """Its forward may do anything around PyTorch's."""


def test_padding_of_an_encoder_of_a_derived_class(make_trainer):
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = DerivedEncoder(encoder().layers[0], 2)

        def forward(self, x):
            padding = torch.arange(6) >= torch.tensor([[6], [4]])
            return self.encoder(x, src_key_padding_mask=padding).masked_fill(padding.unsqueeze(-1), 0)

    net, x = Padded().eval(), torch.randn(8, 6, 16)
    module = calibrated(deepcopy(net), make_trainer, x.split(2))
    assert len(module.network.layers) == 16 and not module.network.plan.float_matmuls
    with torch.no_grad(), module.quantized(False):
        torch.testing.assert_close(module(x[:2]), net(x[:2]), **CLOSE)


def test_cross_attention_of_a_decoder_is_quantized(make_trainer):
    torch.manual_seed(0)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
            self.decoder = nn.TransformerDecoder(layer, 1)
            self.memory = nn.Parameter(torch.randn(7, 16), requires_grad=False)

        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.decoder(x, self.memory.expand(x.shape[0], -1, -1), tgt_mask=mask)

    net, x = Decoder().eval(), torch.randn(8, 6, 16)
    module = calibrated(deepcopy(net), make_trainer, x.split(2))
    layers = module.network.layers
    assert len(layers) == 2 * 6 + 2 and not module.network.plan.float_matmuls
    query, key, value = (
        layers[f"decoder.layers.0.multihead_attn.{name}"].tensors for name in ("q_proj", "k_proj", "v_proj")
    )
    assert key == value != query
    with torch.no_grad():
        torch.testing.assert_close(module(x), net(x), rtol=0.2, atol=0.2)


def test_overrides_can_name_what_the_split_makes(make_trainer):
    net = nn.Sequential(encoder(), nn.Linear(16, 3)).eval()
    names = possible_projections(net)
    assert "0.layers.1.self_attn.k_proj" in names and "0.layers.1.self_attn.query_key_product" in names
    overrides = {"*.k_proj": 4, "*.query_key_product": None}
    module = calibrated(net, make_trainer, torch.randn(8, 6, 16).split(2), overrides=overrides)
    assert module.network.layers["0.layers.1.self_attn.k_proj"].config.weight.bits == 4
    assert set(module.network.plan.float_layers) == {name for name in names if name.endswith("query_key_product")}


def test_scores_are_scaled_by_the_size_of_a_head():
    attention = split(make(batch_first=True))
    x = torch.randn(1, 2, 8)
    seen = []
    attention.query_key_product.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    _, weights = attention(x, x, x, average_attn_weights=False)
    (q, k), scores = seen[0]
    assert q.shape == (1, 2, 2, 4) and k.shape == (1, 2, 4, 2)
    torch.testing.assert_close(weights, torch.softmax(scores / math.sqrt(4), -1))
