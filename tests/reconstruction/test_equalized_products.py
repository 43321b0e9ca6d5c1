"""Equalization of products of two activations: queries over ratios, keys times them."""

import pytest
import torch
from torch import nn

from lightning_calibtip import (
    Calibration,
    Equalization,
    QuantizationModule,
    export_onnx,
    export_packed,
    load_packed,
    run_stages,
)
from lightning_calibtip.network.attention import QueryKeyProduct
from lightning_calibtip.reconstruction.adaquant import adaquant
from lightning_calibtip.reconstruction.equalizable import EqualizationOptions
from lightning_calibtip.reconstruction.equalize import equalize
from lightning_calibtip.reconstruction.options import AdaQuantOptions
from tests.export.exporting import operators, outputs
from tests.uneven import error, uneven_network

TOKENS = torch.randn(96, 5, 6, generator=torch.Generator().manual_seed(1))
PRODUCT = "product"


class Scores(nn.Module):
    """Scores of attention whose queries and keys differ in the range of their channels, and in opposite ways."""

    def __init__(self, read_twice=False):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.product = nn.Linear(6, 8), nn.Linear(6, 8), QueryKeyProduct()
        self.last, self.other = nn.Linear(5, 3), QueryKeyProduct() if read_twice else None
        factors = torch.logspace(-1, 1, 8)
        with torch.no_grad():
            for layer, factor in ((self.query, factors), (self.key, 1 / factors)):
                layer.weight.mul_(factor[:, None])
                layer.bias.mul_(factor)

    def forward(self, x):
        queries = self.query(x)[:, None]
        keys = self.key(x)[:, None].transpose(-1, -2)
        scores = self.product(queries, keys)
        if self.other is not None:
            scores = scores + self.other(queries, keys.roll(1, -1))
        return self.last(scores)[:, 0, 0]


def scores_network(**scheme):
    return uneven_network(Scores().eval(), TOKENS, **scheme)


@pytest.mark.parametrize("per_token", [False, True])
def test_queries_are_divided_by_what_keys_are_multiplied_by(per_token):
    network, calibration = scores_network(per_token=per_token)
    with torch.no_grad(), network.quantized(False):
        exact = network.model(TOKENS)
    before = error(network, TOKENS)
    result = equalize(network, calibration)
    assert result.kept and error(network, TOKENS) < 0.5 * before
    (found,) = [found for found in result.inputs if found.layers == (PRODUCT,)]
    assert found.exponent > 0 and found.error_after < 0.2 * found.error_before
    queries, keys = network.layers[PRODUCT].input_quantizers
    assert keys.ratio is queries.ratio and queries.ratio.max() / queries.ratio.min() > 5
    assert torch.allclose(queries.divisors * keys.divisors, torch.ones(8))
    x = torch.randn(2, 1, 5, 8)
    # Float32 sums of 8 products, each off by a few times 2^-24 of at most 20.
    scores = queries.unrounded(x) @ keys.unrounded(x.transpose(-1, -2))
    assert torch.allclose(scores, x @ x.transpose(-1, -2), atol=1e-4)
    with torch.no_grad(), network.quantized(False):
        assert torch.equal(network.model(TOKENS), exact)


def test_both_operands_learn_the_same_ratios():
    errors = {}
    for ratio_rate in (0.0, 0.05):
        network, calibration = scores_network(weight_bits=4, activation_bits=3)
        # A poor start, from which there is something to learn.
        equalize(network, calibration, EqualizationOptions(exponents=[0.25]))
        queries, keys = network.layers[PRODUCT].input_quantizers
        first = queries.ratio.detach().clone()
        adaquant(network, calibration, AdaQuantOptions(iterations=150, ratio_rate=ratio_rate))
        queries, keys = network.layers[PRODUCT].input_quantizers
        assert keys.ratio is queries.ratio and torch.equal(queries.ratio, first) == (ratio_rate == 0)
        errors[ratio_rate] = error(network, TOKENS)
    assert errors[0.05] < errors[0.0]


def test_a_tensor_that_something_else_reads_is_left_alone():
    # Two products might want other ratios of the same queries.
    for read_twice in (True, False):
        network, calibration = uneven_network(Scores(read_twice).eval(), TOKENS)
        found = [found.layers for found in equalize(network, calibration).inputs]
        assert ((PRODUCT,) in found) == (not read_twice)


def test_an_engine_keeps_its_integer_products():
    network, calibration = scores_network(target="onnxruntime")
    assert all(PRODUCT not in found.layers for found in equalize(network, calibration).inputs)


def test_ratios_come_back_and_are_exported(tmp_path, make_trainer):
    module = QuantizationModule(Scores().eval(), weight_bits=8, activation_bits=8, edge_bits=None)
    run_stages(module, [Calibration(), Equalization(exponents=[1.0])], [TOKENS])
    queries, _ = module.network.layers[PRODUCT].input_quantizers
    assert queries.ratio is not None
    with torch.no_grad():
        wanted = module(TOKENS)
    export_packed(module, tmp_path / "packed.safetensors")
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "quantized.ckpt", weights_only=True)
    for loaded in (
        load_packed(tmp_path / "packed.safetensors", Scores().eval()),
        QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=Scores().eval()),
    ):
        first, second = loaded.network.layers[PRODUCT].input_quantizers
        assert first.ratio is second.ratio and torch.equal(first.ratio, queries.ratio)
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS), wanted)
    plain = QuantizationModule(Scores().eval(), weight_bits=8, activation_bits=8, edge_bits=None)
    run_stages(plain, [Calibration()], [TOKENS])
    for name, exported in (("equalized", module), ("plain", plain)):
        export_onnx(exported, tmp_path / f"{name}.onnx", TOKENS, check=False)
    multiplied, before = (operators(tmp_path / f"{name}.onnx").count("Mul") for name in ("equalized", "plain"))
    assert multiplied - before >= 2
    (engine,) = outputs(tmp_path / "equalized.onnx", TOKENS)
    # A value at the edge of a step may fall to either side: sums and divisions round otherwise in an engine.
    assert (engine - wanted).abs().mean() < 0.02 * wanted.abs().mean()
