"""Blocks found in the structure of models."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip.network.blocks import find_blocks
from lightning_calibtip.network.observe import record


def blocks(model, *inputs, contains=lambda name: True):
    model.eval()
    return find_blocks(record(model, lambda: model(*inputs)), contains)


def test_blocks_are_the_deepest_modules_in_which_paths_fork_and_join():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc(x)

    class AddsTwoInputs(nn.Module):
        """Joins two paths that forked outside: not a block by itself."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, skip):
            return self.fc(x) + skip

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), AddsTwoInputs()

        def forward(self, x):
            return self.out(self.fc(x), x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Inner(), Outer()), nn.Linear(4, 4))
    assert blocks(model, torch.randn(2, 4)) == ["1.0", "1.1"]


def test_attention_is_a_block():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    model = nn.Sequential(nn.Linear(8, 8), Attention())
    assert blocks(model, torch.randn(2, 5, 8)) == ["1"]


def test_a_flat_model_is_never_one_block():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc(x)

    assert blocks(Flat(), torch.randn(2, 4)) == []


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, memory):
        return torch.softmax(self.q(x) @ self.k(memory).transpose(1, 2), -1) @ self.v(memory)


class DecoderLayer(nn.Module):
    """Attention to itself and to an encoder, each with a residual connection, and a residual feed-forward part."""

    def __init__(self):
        super().__init__()
        self.own, self.cross, self.fc = OwnAttention(), OwnAttention(), nn.Linear(8, 8)

    def forward(self, x, memory):
        x = x + self.own(x, x)
        x = x + self.cross(x, memory)
        return x + self.fc(x)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.layers = nn.Linear(8, 8), nn.ModuleList(DecoderLayer() for _ in range(2))

    def forward(self, x):
        memory = self.encoder(x)
        for layer in self.layers:
            x = layer(x, memory)
        return x


def test_attention_is_one_block_with_the_layer_around_it_but_not_with_other_layers():
    assert blocks(Decoder(), torch.randn(2, 5, 8)) == ["layers.0", "layers.1"]


def test_a_residual_connection_around_several_layers_with_attention_does_not_make_them_one_block():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder()

        def forward(self, x):
            return x + self.decoder(x)

    assert blocks(nn.Sequential(Around()), torch.randn(2, 5, 8)) == ["0.decoder.layers.0", "0.decoder.layers.1"]


def test_what_contains_nothing_is_no_block():
    found = blocks(Decoder(), torch.randn(2, 5, 8), contains=lambda name: not name.startswith("layers.0"))
    assert found == ["layers.1"]


def test_attention_with_a_view_of_a_buffer_or_of_a_learned_query_is_still_attention():
    class Masked(nn.Module):
        def __init__(self, learned):
            super().__init__()
            self.norm, self.learned = nn.LayerNorm(8), learned
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
            self.register_buffer("bias", torch.zeros(1, 16, 16))
            self.query = nn.Parameter(torch.randn(1, 5, 8))

        def forward(self, x):
            y = self.norm(x)
            q, mask = (self.query.expand(len(x), -1, -1), None) if self.learned else (self.q(y), self.bias[:, :5, :5])
            return x + self.out(F.scaled_dot_product_attention(q, self.k(y), self.v(y), attn_mask=mask))

    for learned in (False, True):
        model = nn.Sequential(nn.Linear(8, 8), Masked(learned), Masked(learned))
        assert blocks(model, torch.randn(2, 5, 8)) == ["1", "2"]


def test_positions_multiplied_by_a_buffer_are_no_attention():
    """As rotary embeddings of transformers before 5.2x do it, outside of the layers."""

    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder()
            self.register_buffer("frequencies", torch.rand(4))

        def forward(self, x):
            positions = torch.arange(x.shape[1]).float()
            angles = self.frequencies[None, :, None].expand(len(x), -1, 1) @ positions[None, None].expand(len(x), 1, -1)
            return self.decoder(x + angles.transpose(1, 2).repeat(1, 1, 2).cos())

    wanted = ["0.decoder.layers.0", "0.decoder.layers.1"]
    assert blocks(nn.Sequential(Rotated()), torch.randn(2, 5, 8)) == wanted
