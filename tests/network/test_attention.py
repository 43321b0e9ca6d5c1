"""Attention of transformers' models through the registry, and attention that is left float."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_calibtip import Calibration, QuantizationModule
from lightning_calibtip.calibration.calibration_set import output_logits
from lightning_calibtip.network.attention import PRODUCTS, possible_products
from lightning_calibtip.network.layer_types import layer_type_of
from tests import transformer_models as models
from tests.networks import as_loader
from tests.products import products_of

LINEAR_LAYERS = {"bert": 13, "bert_classifier": 14, "roberta": 14, "distilbert": 13, "gpt2": 9, "llama": 15, "t5": 12}
EMBEDDINGS = {"bert": 3, "bert_classifier": 3, "roberta": 3, "distilbert": 2, "gpt2": 2, "llama": 1, "t5": 2}


def calibrated(net, make_trainer, batches, **options):
    module = QuantizationModule(net, **{"weight_bits": 8, "edge_bits": None, **options})
    make_trainer(Calibration()).fit(module, as_loader(*batches))
    return module


@pytest.mark.parametrize("make", models.TEXT_MODELS, ids=lambda make: make.__name__)
def test_a_model_computes_in_float_what_it_did_before(make, make_trainer):
    """Causal and padding masks, grouped heads, a position bias, and attention scaled by the model."""
    net, tokens = make(), models.padded_tokens()
    with torch.no_grad():
        wanted = output_logits(net(**tokens))
        module = calibrated(net, make_trainer, models.batches_of(tokens))
        with module.quantized(False):
            found = output_logits(module.model(**tokens))
        quantized = output_logits(module.model(**tokens))
    present = tokens["attention_mask"].bool()
    for before, after, rounded in zip(wanted, found, quantized, strict=True):
        assert len(before) == len(after)
        if before.shape[:2] == present.shape:
            before, after, rounded = before[present], after[present], rounded[present]
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        assert 1e-4 < float((rounded - before).norm() / before.norm()) < 0.2


@pytest.mark.parametrize("make", models.TEXT_MODELS, ids=lambda make: make.__name__)
def test_every_linear_layer_embedding_and_product_is_quantized(make, make_trainer):
    module = calibrated(make(), make_trainer, models.batches_of(models.padded_tokens()))
    classes = [type(layer.module).__mro__ for layer in module.network.layers.values()]
    assert sum(nn.Embedding in mro for mro in classes) == EMBEDDINGS[make.__name__] + (make is models.t5)
    # Where transformers does not dispatch the attention (T5 before release 5.2), its products are found by running.
    products = [
        name for name in module.network.layers if name.endswith((*PRODUCTS, "matrix_product_0", "matrix_product_1"))
    ]
    assert len(products) == 4
    others = len(module.network.layers) - len(products) - sum(nn.Embedding in mro for mro in classes)
    assert others == LINEAR_LAYERS[make.__name__]
    assert not module.network.float_layers and set(module.network.plan.float_matmuls) <= models.ROTATIONS


def test_probabilities_have_a_range_of_their_own_that_is_never_negative(make_trainer):
    for symmetric in (False, True):
        batches = models.batches_of(models.padded_tokens())
        module = calibrated(models.bert(), make_trainer, batches, activation_symmetric=symmetric)
        for name, layer in module.network.layers.items():
            if name.endswith("probability_value_product"):
                probabilities, values = layer.input_quantizers
                spec = probabilities.spec
                assert (spec.qmin, spec.qmax, float(probabilities.zero_point)) == (0, 255, 0.0)
                assert 0 < float(probabilities.scale) * 255 <= 1.001
                assert (values.spec.qmin == -128) == symmetric
                assert float(values.scale) != float(probabilities.scale)
                learned = [{trainable.role for trainable in q.trainables()} for q in (probabilities, values)]
                assert learned == [{"scale"}, {"scale"} if symmetric else {"scale", "zero_point"}]


@pytest.mark.parametrize(
    "make", [models.bert, models.roberta, models.gpt2, models.llama], ids=lambda make: make.__name__
)
def test_no_float_matrix_product_is_left(make, make_trainer):
    tokens = models.padded_tokens()
    module = calibrated(make(), make_trainer, models.batches_of(tokens))
    listed = module.network.plan.float_matmuls
    assert set(listed) <= models.ROTATIONS
    seen = products_of(module, **tokens)
    assert sum(not all(operands) for _, operands in seen) == len(listed)
    seen = [(name, operands) for name, operands in seen if all(operands)]
    linear, embeddings = LINEAR_LAYERS[make.__name__], EMBEDDINGS[make.__name__]
    assert len(seen) == 4 + linear + embeddings
    assert all(operands for _, operands in seen), seen
    assert (
        sum(len(operands) for _, operands in seen) == 8 + 2 * LINEAR_LAYERS[make.__name__] + EMBEDDINGS[make.__name__]
    )


def test_what_is_left_float_is_found_and_listed_by_name(make_trainer):
    tokens = models.padded_tokens()
    left = {"*layer.0*query_key_product": None, "*layer.1.output.dense": None}
    module = calibrated(models.bert(), make_trainer, models.batches_of(tokens), overrides=left)
    seen = products_of(module, **tokens)
    assert sum(not all(operands) for _, operands in seen) == 2
    listed = [line.name for line in module.layer_summary() if line.kind == "float" and "override" in line.note]
    assert listed == ["bert.encoder.layer.0.attention.self.query_key_product", "bert.encoder.layer.1.output.dense"]


def test_an_override_for_products_that_there_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="matches no quantizable layer"):
        QuantizationModule(models.bert(), overrides={"*layer.7*query_key_product": 4})
    module = QuantizationModule(models.bert(), overrides={"*.intermediate.query_key_product": 4})
    with pytest.raises(ValueError, match="matches no quantizable layer"):
        module.network.prepare(lambda: module.model(**models.padded_tokens()))
    with pytest.raises(ValueError, match="matches no quantizable layer"):
        QuantizationModule(nn.Sequential(nn.Linear(2, 2)), overrides={"*_product": 4})
    assert possible_products(nn.Linear(2, 2)) == []


def test_queries_keys_and_values_are_computed_from_one_input_with_one_quantizer(make_trainer):
    module = calibrated(models.bert(), make_trainer, models.batches_of(models.padded_tokens()))
    layers = module.network.layers
    for attention in [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]:
        quantizers = [layers[f"{attention}.{name}"].input_quantizers for name in ("query", "key", "value")]
        assert all(len(own) == 1 and own[0] is quantizers[0][0] for own in quantizers)


def test_the_products_of_attention_are_layers_without_a_weight_and_with_two_inputs(make_trainer):
    module = calibrated(models.bert(), make_trainer, models.batches_of(models.padded_tokens()), activation_bits=6)
    products = [layer for name, layer in module.network.layers.items() if name.endswith(PRODUCTS)]
    for layer in products:
        assert layer_type_of(layer.module).weight is None and not layer.has_weight
        assert layer.config.weight is None and [spec.bits for spec in layer.config.inputs] == [6, 6]


def test_the_users_own_model_is_not_rerouted():
    net = models.gpt2()
    QuantizationModule(net)
    assert net.config._attn_implementation != "calibtip" and net.config.use_cache


def test_attention_of_a_model_without_eager_attention_beside_it_is_found_as_a_function(make_trainer, monkeypatch):
    net, tokens = models.bert(), models.padded_tokens()
    with torch.no_grad():
        wanted = net(**tokens).start_logits
    monkeypatch.setattr("lightning_calibtip.network.attention._EAGER", "eager_under_another_name")
    module = calibrated(net, make_trainer, models.batches_of(tokens))
    names = [f"bert.encoder.layer.{i}.attention.self.fused_attention_0" for i in range(2)]
    assert {f"{name}.{product}" for name in names for product in PRODUCTS} <= module.network.layers.keys()
    assert not module.network.plan.float_matmuls
    with torch.no_grad(), module.quantized(False):
        torch.testing.assert_close(module.model(**tokens).start_logits, wanted, rtol=1e-4, atol=1e-4)


def test_attention_that_only_a_later_batch_reaches_is_listed(make_trainer, caplog):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = models.bert(), models.distilbert()

        def forward(self, input_ids, attention_mask):
            output = self.first(input_ids, attention_mask).start_logits
            if int(input_ids[0, 0]) == 2:
                output = output + self.second(input_ids, attention_mask).start_logits
            return output

    batches = models.batches_of(models.padded_tokens())
    for index, batch in enumerate(batches):
        batch["input_ids"][0, 0] = 2 if index == 1 else 3
    module = calibrated(Sometimes(), make_trainer, batches)
    found = module.network.plan.float_matmuls
    late = [name for name in found if name.startswith("second") and name.endswith("_product")]
    assert len(late) == 4 and "first ran after the first calibration batch" in caplog.text
    assert all(line.kind == "float" for line in module.layer_summary() if line.name in late)


class First(nn.Module):
    def forward(self, outputs):
        return outputs[0]


def test_what_the_users_code_multiplies_in_float_is_listed_with_a_warning(make_trainer, caplog):
    torch.manual_seed(0)
    # Weights that are computed are not the module's own.
    lstm = weight_norm(nn.LSTM(8, 8, batch_first=True), "weight_hh_l0")
    net, name, operators = nn.Sequential(lstm, First(), nn.Linear(8, 3)), "0", "rnn"
    x = torch.randn(6, 5, 8)
    module = calibrated(net.eval(), make_trainer, x.split(2))
    assert list(module.network.plan.float_matmuls) == [name] and operators in module.network.plan.float_matmuls[name]
    assert any(record.message.startswith(f"{name} computes") for record in caplog.records)
    line = next(line for line in module.layer_summary() if line.name == name)
    assert line.kind == "float" and "outside of a quantizable layer" in line.note
    with torch.no_grad():
        torch.testing.assert_close(module(x), net(x), rtol=0.1, atol=0.1)
        with module.quantized(False):
            torch.testing.assert_close(module(x), net(x))
