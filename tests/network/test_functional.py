"""Matrix products that models compute by functions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from lightning_calibtip import AdaQuant, Calibration, QuantizationModule, export_onnx, run_stages
from lightning_calibtip.network.functional import FusedAttention, find_products
from lightning_calibtip.network.observe import record
from tests.export.exporting import outputs
from tests.products import products_of

X = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(0))
PRODUCTS = {"fused_attention_0.query_key_product", "fused_attention_0.probability_value_product"}


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_matmul(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2), -1).matmul(v)


def by_einsum(q, k, v):
    scores = torch.einsum("nqe,nke->nqk", q, k)
    return torch.einsum("nqk,nke->nqe", scores.softmax(-1), v)


class Attention(nn.Module):
    """As users write it; positions are multiplied, too, and no product for an engine."""

    def __init__(self, compute):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.compute = compute
        self.register_buffer("frequencies", torch.rand(1, 8))

    def forward(self, x):
        positions = torch.arange(x.shape[1], dtype=x.dtype)[:, None] @ self.frequencies
        x = x + 0.1 * positions.cos()
        return self.out(self.compute(self.query(x), self.key(x), self.value(x)))


def quantized(model, *data, **options):
    module = QuantizationModule(model.eval(), **{"weight_bits": 8, "edge_bits": None, **options})
    run_stages(module, [Calibration()], data)
    return module


def found_in(model, x):
    return find_products(model, lambda: model(x), lambda: record(model, lambda: model(x)))


@pytest.mark.parametrize(
    "compute, names",
    [
        (fused, PRODUCTS),
        # The first product is that of positions.
        (by_matmul, {"matrix_product_1", "matrix_product_2"}),
        (by_einsum, {"matrix_product_1", "matrix_product_2"}),
    ],
)
def test_products_in_the_users_code_are_quantized(compute, names):
    model = Attention(compute).eval()
    with torch.no_grad():
        exact = model(X)
    module = quantized(model, *X.split(4))
    products = {name for name, layer in module.network.layers.items() if not layer.has_weight}
    assert products == names and len(module.network.layers) == 6
    assert list(module.network.plan.float_matmuls) == [""]
    seen = [operands for _, operands in products_of(module, X)]
    assert sorted(map(tuple, seen)) == [(False, False)] + 6 * [(True, True)]
    with torch.no_grad():
        assert 1e-4 < (module(X) - exact).norm() / exact.norm() < 0.05
        with module.quantized(False):
            torch.testing.assert_close(module(X), exact)
        # Another length, and a copy of its own.
        copied = copy.deepcopy(module)
        torch.testing.assert_close(copied(X[:, :3]), module(X[:, :3]))
    assert type(module.model.query).__mro__[1] is nn.Linear


def test_they_are_reconstructed_saved_and_exported(tmp_path, make_trainer):
    module = quantized(Attention(fused), *X.split(4), weight_bits=4, activation_bits=8)
    run_stages(module, [AdaQuant(iterations=5, batch_size=4)], X.split(4))
    with torch.no_grad():
        wanted = module(X)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "quantized.ckpt", weights_only=True)
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=Attention(fused).eval())
    with torch.no_grad():
        assert torch.equal(loaded(X), wanted)
    export_onnx(module, tmp_path / "net.onnx", X[:4], check=False)
    (engine,) = outputs(tmp_path / "net.onnx", X[:4])
    # A value at the edge of a step may fall to either side: sums and divisions round otherwise in an engine.
    assert (engine - wanted[:4]).abs().mean() < 0.02 * wanted.abs().mean()


HEADS = torch.randn(2, 4, 3, 6, generator=torch.Generator().manual_seed(1))
FEW = HEADS[:, :2]
NOTHING = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])


@pytest.mark.parametrize(
    "tensors, options",
    [
        ((HEADS, HEADS, HEADS), {}),
        ((HEADS, HEADS, HEADS), {"is_causal": True, "scale": 0.3}),
        ((HEADS, FEW, FEW), {"enable_gqa": True}),
        ((HEADS, HEADS, HEADS), {"attn_mask": NOTHING}),
        ((HEADS, HEADS, HEADS), {"attn_mask": torch.randn(2, 1, 3, 3)}),
        ((HEADS[0], HEADS[0], HEADS[0]), {"attn_mask": NOTHING.expand(4, 3, 3)}),
        ((HEADS[0], FEW[0], FEW[0]), {"enable_gqa": True}),
        ((HEADS, HEADS, HEADS), {"attn_mask": torch.zeros(3, 3).masked_fill(~NOTHING, -torch.inf)}),
    ],
)
def test_fused_attention_computes_what_the_function_does(tensors, options):
    wanted = F.scaled_dot_product_attention(*tensors, **options)
    # Sums of at most 6 products of float32 in another order, and exponentials of scores below 10.
    torch.testing.assert_close(FusedAttention()(*tensors, **options), wanted, rtol=1e-4, atol=1e-5)


class Window(nn.Module):
    """As Swin has it: a function takes the weights of the layers."""

    def __init__(self, bias=None, has_bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj, self.bias = nn.Linear(8, 24, bias=has_bias), nn.Linear(8, 8), bias

    def forward(self, x):
        bias = self.qkv.bias if self.bias is None else self.bias
        q, k, v = F.linear(input=x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return F.linear(by_matmul(q, k, v), self.proj.weight, self.proj.bias)


# BEiT and Swin v2 put the bias together themselves.
@pytest.mark.parametrize("options", [{}, {"bias": torch.arange(24.0) / 20, "has_bias": False}])
def test_linear_functions_of_a_layers_weight_are_led_to_the_layer(options, tmp_path, make_trainer):
    model = Window(**options).eval()
    with torch.no_grad():
        exact = model(X)
    module = quantized(model, *X.split(4))
    assert set(module.network.layers) == {"qkv", "proj", "matrix_product_0", "matrix_product_1"}
    assert not module.network.plan.float_matmuls and not module.network.float_layers
    assert all(all(operands) for _, operands in products_of(module, X))
    with torch.no_grad():
        wanted = module(X)
        assert 1e-4 < (wanted - exact).norm() / exact.norm() < 0.05
        with module.quantized(False):
            torch.testing.assert_close(module(X), exact)
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "quantized.ckpt", weights_only=True)
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=Window(**options).eval())
    with torch.no_grad():
        assert torch.equal(loaded(X), wanted)


def test_a_weight_that_is_taken_with_another_bias_is_said_to_be(caplog):
    module = quantized(Window(torch.zeros(24)), *X.split(4))
    assert "proj" in module.network.layers and "qkv" not in module.network.layers
    reason = module.network.float_layers["qkv"]
    assert reason == "its weight is multiplied by the model itself, and not by the layer's own forward"
    assert f"Layer qkv stays float: {reason}." in caplog.text


def test_a_module_of_the_users_with_such_a_name_stays():
    class Named(Attention):
        def __init__(self):
            super().__init__(fused)
            self.fused_attention_0 = nn.Identity()

    model = Named().eval()
    assert not found_in(model, X).operations
    module = quantized(model, *X.split(4))
    assert type(module.model.fused_attention_0) is nn.Identity and "" in module.network.plan.float_matmuls


def test_what_does_not_reproduce_the_output_is_left_alone(monkeypatch):
    model = Attention(fused).eval()
    assert found_in(model, X).operations
    monkeypatch.setattr("lightning_calibtip.network.functional.FusedAttention.forward", lambda self, q, k, v, **_: q)
    assert not found_in(model, X)
    assert not any(isinstance(module, FusedAttention) for module in model.modules())


def vit():
    return VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )


def swin():
    return SwinTransformer([2, 2], 8, [2, 1], [2, 2], [2, 2], num_classes=3, stochastic_depth_prob=0.0)


def timm_vit():
    models = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
    return models.VisionTransformer(8, 4, embed_dim=16, depth=2, num_heads=2, num_classes=3)


def timm_swin():
    models = pytest.importorskip("timm.models.swin_transformer", reason="timm is not installed")
    return models.SwinTransformer(8, 2, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=2, num_classes=3)


class Encoder(nn.Module):
    """Pixels of a picture as a sequence for torch's own encoder."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.encoder = nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.flatten(2).mT)).mean(1))


@pytest.mark.parametrize(("make", "attentions"), [(vit, 2), (swin, 3), (timm_vit, 2), (timm_swin, 3), (Encoder, 2)])
def test_no_float_product_is_left_in_vision_transformers_and_encoders(make, attentions):
    torch.manual_seed(0)
    model, images = make().eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        wanted = model(images)
    module = quantized(model, images)
    assert not module.network.plan.float_matmuls and not module.network.float_layers
    seen = products_of(module, images)
    linear = sum(type(part).__mro__[1] is nn.Linear for part in module.model.modules() if len(type(part).__mro__) > 2)
    assert len(seen) >= 2 * attentions + linear > 10
    assert all(all(operands) for _, operands in seen), seen
    with torch.no_grad(), module.quantized(False):
        torch.testing.assert_close(module(images), wanted, rtol=1e-4, atol=1e-5)


def test_an_override_names_them():
    module = quantized(Attention(fused), *X.split(4), overrides={"*fused_attention_0.query*": (4, 4)})
    widths = {name: layer.config.bit_widths.activation for name, layer in module.network.layers.items()}
    assert widths["fused_attention_0.query_key_product"] == 4
    assert widths["fused_attention_0.probability_value_product"] == 8
    module = quantized(Attention(fused), *X.split(4), overrides={"*query_key*": None})
    assert "fused_attention_0.query_key_product" in module.network.float_layers
    for pattern in ("*matrix_product_7", "*query_keys"):
        with pytest.raises(ValueError, match="matches no quantizable layer"):
            quantized(Attention(fused), *X.split(4), overrides={pattern: 4})


class Tabled(nn.Module):
    """Products with weights, whatever these are, before and between products of activations."""

    def __init__(self, normed=False):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        if normed:
            self.table = nn.utils.parametrizations.weight_norm(self.table)

    def forward(self, x):
        x = x + 50 * torch.softmax(self.first(x), -1) @ self.table.weight
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(self.table(torch.softmax(q @ k.mT / 50, -1) @ v))


@pytest.mark.parametrize("normed", [False, True])
def test_positions_do_not_depend_on_whether_a_weight_is_a_parameter(normed, tmp_path, make_trainer, caplog):
    model = Tabled(normed).eval()
    with torch.no_grad():
        exact = model(X)
    module = quantized(model, *X.split(4))
    assert {"matrix_product_1", "matrix_product_2"} == {n for n, layer in module.network.layers.items() if "_" in n}
    with torch.no_grad():
        wanted = module(X)
        assert (wanted - exact).norm() / exact.norm() < 0.05
    assert "now computes" not in caplog.text
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "quantized.ckpt", weights_only=True)
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=Tabled(normed).eval())
    with torch.no_grad():
        assert torch.equal(loaded(X), wanted)


class Handed(nn.Module):
    """A weight is handed to another module, or taken by two."""

    class Head(nn.Module):
        def forward(self, x, weight):
            return F.linear(x, weight)

    def __init__(self, heads):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.taken, self.out = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.heads = nn.ModuleList(self.Head() for _ in range(heads))

    def forward(self, x):
        x = self.first(x)
        for head in self.heads:
            x = head(x, self.taken.weight)
        return self.out(x)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_weight_that_is_handed_to_other_modules_is_said_to_stay_float(heads):
    module = quantized(Handed(heads).eval(), *X.split(4))
    assert set(module.network.layers) == {"first", "out"}
    assert module.network.float_layers["taken"].startswith("its weight is multiplied by module heads.0, and not")


def test_a_layer_left_float_later_comes_back_from_a_checkpoint(tmp_path, make_trainer):
    module = quantized(Attention(fused), *X.split(4))
    module.network.leave_float("fused_attention_0.query_key_product", "for a test")
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "quantized.ckpt", weights_only=True)
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=Attention(fused).eval())
    with torch.no_grad():
        assert torch.equal(loaded(X), module(X))


def test_functions_in_place_of_a_forward_and_products_that_fail_are_left_alone(monkeypatch):
    model = Attention(fused)
    model.query = nn.Sequential(model.query, nn.Identity())
    model.query[1].forward = torch.relu
    module = quantized(model.eval(), *X.split(4))
    assert module.network.layers.keys() >= PRODUCTS

    def fail(self, *args, **kwargs):
        raise RuntimeError("sizes do not match")

    model = Attention(fused).eval()
    monkeypatch.setattr("lightning_calibtip.network.functional.FusedAttention.forward", fail)
    assert not found_in(model, X)
    with torch.no_grad():
        assert model(X).shape == X.shape
