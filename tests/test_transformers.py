"""Models of transformers through calibration, reconstruction, allocation and checkpoints."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torchmetrics.text import Perplexity

from lightning_calibtip import AdaQuant, BiasTuning, BitAllocation, Calibration, QuantizationModule, quantize
from lightning_calibtip.allocation.costs import CostInputs, cost_table, open_candidates
from lightning_calibtip.allocation.work import measure_work
from lightning_calibtip.calibration.calibration_set import output_logits
from lightning_calibtip.calibration.logits import sample_divergences
from lightning_calibtip.quantization.affine import choose_qparams, fake_quantize
from lightning_calibtip.quantization.spec import BitWidths, TensorSpec
from lightning_calibtip.reconstruction.units import find_units
from tests import transformer_models as models
from tests.networks import as_loader

LAYERS = {
    models.bert: ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    models.roberta: ["roberta.encoder.layer.0", "roberta.encoder.layer.1"],
    models.distilbert: ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"],
    models.gpt2: ["transformer.h.0", "transformer.h.1"],
    models.llama: ["model.layers.0", "model.layers.1"],
    # Older transformers call them vit.encoder.layer.
    models.vit: [name for name, module in models.vit().named_modules() if type(module).__name__ == "ViTLayer"],
}


def batches_for(make):
    if make is models.vit:
        return list(torch.randn(12, 1, 16, 16, generator=torch.Generator().manual_seed(0)).split(4))
    return models.batches_of(models.padded_tokens())


def calibrated(net, make_trainer, batches, *stages, observer="mse", **options):
    module = QuantizationModule(net, **{"weight_bits": 8, **options})
    make_trainer(Calibration(observer=observer), *stages).fit(module, as_loader(*batches))
    return module


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: make.__name__)
def test_a_transformers_layer_is_a_block_with_its_attention_and_all_are_reconstructed(make, make_trainer):
    module = calibrated(make(), make_trainer, batches_for(make), weight_bits=3, activation_bits=6, edge_bits=None)
    units = {unit.name: unit for unit in find_units(module.network, "block")}
    assert [name for name in units if name in LAYERS[make]] == LAYERS[make]
    for name in LAYERS[make]:
        types = [type(layer.module).__name__ for layer in units[name].layers]
        assert types.count("QueryKeyProduct") == types.count("ProbabilityValueProduct") == 1 and len(types) > 5
    before = {name: layer.save() for name, layer in module.network.layers.items()}
    adaquant = AdaQuant(iterations=40, batch_size=4, drop_probability=0.3, rounding="learned")
    make_trainer(adaquant).fit(module, as_loader(*batches_for(make)))
    assert adaquant.result.figures["error_after"] < 0.97 * adaquant.result.figures["error_before"]
    kept = [name for name in LAYERS[make] if units[name].layers[0].errors[1] < units[name].layers[0].errors[0]]
    assert kept
    for name in kept:
        for layer in units[name].layers:
            pairs = zip(before[layer.name].qparams, layer.save().qparams, strict=True)
            assert any(not torch.equal(was, now) for was, now in pairs), f"{layer.name} has learned no range"
            for quantizer in layer.input_quantizers:
                assert not quantizer.spec.nonnegative or float(quantizer.zero_point) == 0


def test_ranges_of_tokens_are_those_of_their_own_values(make_trainer):
    tokens = models.padded_tokens()
    module = calibrated(models.bert(), make_trainer, models.batches_of(tokens), per_token=True, activation_bits=4)
    layer = module.network.layers["bert.encoder.layer.0.intermediate.dense"]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 50
    rows = [
        fake_quantize(row, *choose_qparams(row.min().view(1), row.max().view(1), TensorSpec(4)), 0, 15)
        for row in x.view(-1, 32)
    ]
    torch.testing.assert_close(layer.input_quantizers[0](x), torch.stack(rows).view_as(x))
    products = [layer for name, layer in module.network.layers.items() if name.endswith("_product")]
    dynamic = [[quantizer.spec.dynamic for quantizer in product.input_quantizers] for product in products]
    assert dynamic == [[True, True], [True, False]] * 2, "values are summed over tokens: they keep one range"
    keys = torch.randn(1, 4, 8, 5, generator=torch.Generator().manual_seed(0))
    of_keys = products[0].input_quantizers[1](keys)
    alone = products[0].input_quantizers[1](keys[..., 2:3])
    torch.testing.assert_close(of_keys[..., 2:3], alone)


def test_ranges_of_tokens_help_where_tokens_differ_and_survive_a_checkpoint(make_trainer, tmp_path):
    tokens = models.padded_tokens()
    net = models.bert()
    # One token has activations far greater than the others'.
    net.bert.embeddings.word_embeddings.weight.data[7] *= 0
    net.bert.encoder.layer[0].output.LayerNorm.weight.data[3] = 30.0
    with torch.no_grad():
        wanted = output_logits(net(**tokens))
        errors = {}
        for per_token in (False, True):
            module = calibrated(net, make_trainer, models.batches_of(tokens), per_token=per_token, activation_bits=4)
            errors[per_token] = float(sample_divergences(module(**tokens), wanted).mean())
    assert errors[True] < errors[False]
    adaquant = AdaQuant(iterations=2)
    trainer = make_trainer(adaquant)
    trainer.fit(module, as_loader(*models.batches_of(tokens)))
    trainer.save_checkpoint(tmp_path / "tokens.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "tokens.ckpt", model=models.bert())
    with torch.no_grad():
        assert torch.equal(loaded(**tokens).start_logits, module(**tokens).start_logits)


@pytest.mark.parametrize("make", [models.bert, models.roberta, models.gpt2, models.t5], ids=lambda make: make.__name__)
def test_checkpoints_hold_the_products_and_reload_exactly(make, make_trainer, tmp_path):
    tokens = models.padded_tokens()
    module = QuantizationModule(make(), weight_bits=4)
    trainer = make_trainer(Calibration(), AdaQuant(iterations=3))
    trainer.fit(module, as_loader(*models.batches_of(tokens)))
    trainer.save_checkpoint(tmp_path / "quantized.ckpt")
    untrained = make()
    for parameter in untrained.parameters():
        parameter.data.normal_()
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=untrained)
    with torch.no_grad():
        for found, wanted in zip(output_logits(loaded(**tokens)), output_logits(module(**tokens)), strict=True):
            assert torch.equal(found, wanted)
    assert [line.name for line in loaded.layer_summary()] and len(loaded.network.layers) == len(module.network.layers)


def test_a_tied_head_stays_tied_and_is_stored_once(make_trainer, tmp_path):
    net = models.roberta()
    module = QuantizationModule(net, weight_bits=4, edge_bits=None)
    trainer = make_trainer(Calibration(), AdaQuant(iterations=5), BiasTuning(epochs=1))
    trainer.fit(module, as_loader(*batches_for(models.roberta)))
    embedding, head = module.model.roberta.embeddings.word_embeddings, module.model.lm_head.decoder
    assert head.parametrizations.weight is embedding.parametrizations.weight
    assert torch.equal(head.weight, embedding.weight) and not torch.equal(head.weight, net.lm_head.decoder.weight)
    trainer.save_checkpoint(tmp_path / "tied.ckpt")
    saved = torch.load(tmp_path / "tied.ckpt", weights_only=True)
    assert "lm_head.decoder" not in saved["calibtip"]["weights"]
    apart = models.roberta()
    apart.lm_head.decoder.weight = nn.Parameter(apart.lm_head.decoder.weight.clone())
    with pytest.raises(ValueError, match=r"weight of lm_head.decoder tied to an embedding's"):
        QuantizationModule.load_from_checkpoint(tmp_path / "tied.ckpt", model=apart)


def test_a_tied_head_that_stays_float_keeps_the_float_weight(make_trainer):
    net = models.roberta()
    module = calibrated(
        net, make_trainer, batches_for(models.roberta), weight_bits=2, overrides={"lm_head.decoder": None}
    )
    assert torch.equal(module.model.lm_head.decoder.weight, net.lm_head.decoder.weight)
    assert not torch.equal(module.model.roberta.embeddings.word_embeddings.weight, net.lm_head.decoder.weight)


def test_embeddings_have_a_scale_for_each_row_or_one(make_trainer):
    for per_channel, scales in ((True, 50), (False, 1)):
        module = calibrated(models.bert(), make_trainer, batches_for(models.bert), per_channel=per_channel)
        layer = module.network.layers["bert.embeddings.word_embeddings"]
        assert layer.weight_quantizer.scale.numel() == scales and layer.input_quantizers == ()


class LanguageModel(pl.LightningModule):
    """A user's module: perplexity of the next token, padding left out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.perplexity = net, Perplexity(ignore_index=-100)

    def forward(self, input_ids, attention_mask=None):
        return self.net(input_ids=input_ids, attention_mask=attention_mask)

    def validation_step(self, batch, batch_idx):
        logits = self(**batch).logits[:, :-1]
        wanted = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        self.perplexity(logits, wanted)
        self.log("perplexity", self.perplexity)


@pytest.mark.parametrize("make", [models.gpt2, models.llama], ids=lambda make: make.__name__)
def test_a_causal_decoder_is_quantized_and_its_perplexity_evaluated(make):
    batches = models.batches_of(models.padded_tokens(16))
    options = {"adaquant": {"iterations": 30, "batch_size": 4}}
    run = quantize(LanguageModel(make()), batches, as_loader(*batches), "sequential", options, weight_bits=4)
    float_perplexity = run.float_metrics["perplexity"]
    found = {stage.name: stage.metrics["perplexity"] for stage in run.stages}
    assert float_perplexity > 1 and found["Calibration"] != float_perplexity
    assert found["BiasTuning"] == pytest.approx(float_perplexity, rel=0.15)
    (figures,) = (stage.figures for stage in run.stages if stage.name == "AdaQuant")
    assert figures["error_after"] < figures["error_before"]


def test_products_embeddings_and_heads_take_part_in_allocation(make_trainer):
    module = QuantizationModule(models.roberta(), weight_bits=8)
    stage = BitAllocation(compression=0.2, candidates=[(4, 4), (4, 8), (8, 4), (8, 8)], bit_operations=1e9)
    make_trainer(Calibration(), stage).fit(module, as_loader(*batches_for(models.roberta)))
    losses = stage.allocation.sensitivity.losses
    product = losses["roberta.encoder.layer.0.attention.self.query_key_product"]
    w4a4, w4a8, w8a4 = BitWidths(4, 4), BitWidths(4, 8), BitWidths(8, 4)
    assert product[w4a4] == product[w8a4] != product[w4a8], "a product has no weight: only activation bits act on it"
    assert product[w4a8] == stage.allocation.sensitivity.base_loss
    embedding = losses["roberta.embeddings.position_embeddings"]
    assert embedding[w4a4] == embedding[w4a8] != embedding[w8a4]
    bits = {
        line.name: (line.weight_bits, line.activation_bits)
        for line in module.layer_summary()
        if line.kind == "quantized"
    }
    assert bits["roberta.encoder.layer.0.attention.self.query_key_product"][0] is None
    assert stage.result.figures["compression"] <= 0.2
    layers = module.network.layers.values()
    weights = sum(layer.weight.numel() * layer.config.weight.bits for layer in layers if layer.has_weight)
    everything = sum(map(module.network.weights_of, [*module.network.layers, *module.network.float_layers]))
    assert weights / 32 / everything == pytest.approx(stage.result.figures["compression"])


def test_the_mixed_pipeline_runs_on_a_transformer():
    options = {
        "adaquant": {"iterations": 5},
        "preparation": {"iterations": 3},
        "allocation": {"candidates": [(3, 8), (8, 8)], "compression": 0.16},
    }
    run = quantize(models.bert(), batches_for(models.bert), None, "mixed", options)
    assert {layer.config.weight.bits for layer in run.module.network.layers.values() if layer.has_weight} == {3, 8}


def test_work_of_products_counts_both_operands(make_trainer):
    module = calibrated(models.bert(), make_trainer, batches_for(models.bert))
    module.calibration.batches.extend(batches_for(models.bert))
    work = measure_work(module.network, module.calibration)
    product = work["bert.encoder.layer.0.attention.self.query_key_product"]
    assert product.multiply_accumulates == 4 * 16 * 16 * 8 and product.input_elements == 2 * 4 * 16 * 8
    assert work["bert.embeddings.word_embeddings"].input_elements == 0
    w2a8 = BitWidths(2, 8)
    options = open_candidates(module.network, [w2a8])
    costs = cost_table("bit_operations", CostInputs(module.network, module.calibration, options))
    name = "bert.encoder.layer.0.attention.self.query"
    assert costs[name][w2a8] == 16 * work[name].multiply_accumulates
    assert costs["bert.encoder.layer.0.attention.self.query_key_product"][w2a8] == 64 * product.multiply_accumulates


def test_layers_that_share_a_weight_agree_on_its_bit_width():
    options = {"weight_bits": 3, "edge_bits": None}
    batch = models.padded_tokens()

    def bits(make=models.gpt2, **more):
        module = QuantizationModule(make(), **{**options, **more})
        module.network.prepare(lambda: module.model(**batch))
        return {name: layer.config.bit_widths for name, layer in module.network.layers.items()}, module.network

    found, network = bits(overrides={"lm_head": [8, 6]})
    assert found["transformer.wte"].weight == 8 and found["lm_head"] == BitWidths(8, 6)
    assert {"lm_head", "transformer.wte"} <= set(network.layers) - set(network.searchable_layers)
    found, network = bits(models.t5, edge_bits=8)
    assert found["shared"].weight == found["encoder.embed_tokens"].weight == 8
    assert "shared" not in network.searchable_layers
    with pytest.raises(ValueError, match="overrides give one weight, which these layers share, several"):
        bits(overrides={"lm_head": 8, "transformer.wte": 4})
    _, network = bits(overrides={"transformer.wte": None})
    notes = {line.name: line.note for line in network.summary()}
    assert "copy of its own" in notes["lm_head"]


def test_a_tied_head_costs_operations_at_the_bit_width_of_its_weight(make_trainer):
    module = QuantizationModule(models.gpt2(), edge_bits=None)
    stage = BitAllocation(bit_operations=1.2e7, candidates=[(2, 8), (4, 8), (8, 8)], checks=4)
    make_trainer(Calibration(), stage).fit(module, as_loader(*batches_for(models.gpt2)))
    network = module.network
    module.calibration.batches.extend(batches_for(models.gpt2))
    work = measure_work(network, module.calibration)
    true = 0.0
    for name, layer in network.layers.items():
        bit_widths = layer.config.bit_widths
        weight_bits = (layer.tied_to or layer).config.bit_widths.weight
        true += work[name].multiply_accumulates * (weight_bits or bit_widths.activation) * (bit_widths.activation or 32)
    assert true == pytest.approx(stage.result.figures["bit_operations"]) and true <= 1.2e7


def test_a_model_of_embeddings_alone_is_quantized(make_trainer):
    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.users, self.items = nn.Embedding(20, 4), nn.Embedding(30, 4)

        def forward(self, pairs):
            return (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(1, keepdim=True)

    net = Factors()
    pairs = torch.randint(0, 20, (32, 2), generator=torch.Generator().manual_seed(0))
    module = calibrated(net, make_trainer, pairs.split(8), weight_bits=4, edge_bits=None)
    assert len(module.model.users.weight[3].unique()) <= 16 and not torch.equal(
        module.model.users.weight, net.users.weight
    )
    with pytest.raises(ValueError, match="already quantized"):
        QuantizationModule(module.model)
