"""Sequences of a batch that are padded to one length: the padding counts nowhere."""

import pytest
import torch
from torch import nn

from lightning_calibtip import AdaQuant, BiasTuning, Calibration, QuantizationModule
from lightning_calibtip.calibration.calibration_set import output_logits
from lightning_calibtip.calibration.logits import sample_divergences
from lightning_calibtip.calibration.losses import Loss
from lightning_calibtip.reconstruction.units import find_units
from tests import transformer_models as models
from tests.networks import as_loader


def calibrated(net, make_trainer, batches, *stages, observer="mse", **options):
    module = QuantizationModule(net, **{"weight_bits": 8, **options})
    make_trainer(Calibration(observer=observer), *stages).fit(module, as_loader(*batches))
    return module


def padded_to(tokens, length):
    return {
        key: nn.functional.pad(value, (0, length - value.shape[1]), value=key == "input_ids")
        for key, value in tokens.items()
    }


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
def test_padding_changes_neither_ranges_nor_predictions(observer, make_trainer):
    """The same sequences padded to 16, to 24 (no other size) and to 32 (the size of the model)."""
    tokens = models.padded_tokens()
    present = tokens["attention_mask"].bool()
    modules = {
        length: calibrated(
            models.bert(), make_trainer, models.batches_of(padded_to(tokens, length)), observer=observer, weight_bits=4
        )
        for length in (16, 24, 32)
    }
    scales = {
        length: torch.stack([q.scale[0] for layer in module.network.layers.values() for q in layer.input_quantizers])
        for length, module in modules.items()
    }
    with torch.no_grad():
        logits = {
            length: modules[length](**padded_to(tokens, length)).start_logits[:, :16][present] for length in modules
        }
    for length in (24, 32):
        # Another order of summation may round a value the other way, and a search for a range may then end elsewhere.
        # If padding counted, the median scale would change by 4e-3 and the median logit by 2e-2.
        changes = (scales[length] / scales[16] - 1).abs()
        assert float(changes.median()) < 1e-4 and float(changes.max()) < 0.03
        torch.testing.assert_close(logits[length], logits[16], rtol=0, atol=0.05)
        assert float((logits[length] - logits[16]).abs().median()) < 2e-3


def test_without_the_mask_padding_would_widen_ranges(make_trainer):
    """What the masks are for: padding that the model is given, with values of its own."""

    class Unmasked(QuantizationModule):
        def token_mask(self, batch):
            return None

    tokens = padded_to(models.padded_tokens(), 40)
    masked = calibrated(models.bert(), make_trainer, models.batches_of(tokens), observer="minmax")
    unmasked = Unmasked(models.bert(), weight_bits=8)
    make_trainer(Calibration(observer="minmax")).fit(unmasked, as_loader(*models.batches_of(tokens)))
    ratios = [
        float(unmasked.network.layers[name].input_quantizers[0].scale / layer.input_quantizers[0].scale)
        for name, layer in masked.network.layers.items()
        if layer.input_quantizers
    ]
    assert min(ratios) > 0.9999 and max(ratios) > 1.05


def test_errors_of_padding_do_not_count_in_reconstruction(make_trainer):
    errors = []
    for length in (16, 32):
        batches = models.batches_of(padded_to(models.padded_tokens(), length))
        adaquant = AdaQuant(iterations=3, batch_size=4)
        module = calibrated(models.bert(), make_trainer, batches, adaquant, weight_bits=4)
        errors.append(module.network.layers["bert.encoder.layer.0.output.dense"].errors)
    # If padding counted, it would change by 7 %.
    assert errors[1][0] == pytest.approx(errors[0][0], rel=5e-3)
    # The optimiser's first steps are as large where a gradient is nothing but noise.
    assert errors[1][1] == pytest.approx(errors[0][1], rel=5e-2)


def test_divergence_and_squared_error_leave_padding_out(make_trainer):
    tokens = models.padded_tokens()
    for make in (models.bert, models.gpt2):
        found = {}
        for length in (16, 32):
            module = calibrated(make(), make_trainer, models.batches_of(padded_to(tokens, length)), weight_bits=4)
            module.calibration.batches.extend(models.batches_of(padded_to(tokens, length)))
            found[length] = [Loss(module.network, module.calibration, metric)() for metric in ("kl", "mse")]
        assert found[32] == pytest.approx(found[16], rel=2e-2)
        assert found[16][0] > 1e-5


def test_divergence_of_positions_as_classes_is_that_of_the_tokens_alone():
    tokens = torch.tensor([[True, True, True, False, False]])
    wanted, found = torch.tensor([[0.3, -1.0, 2.0, 7.0, -3.0]]), torch.tensor([[0.1, -0.5, 1.0, -9.0, 40.0]])
    masked = sample_divergences({"end_logits": found}, [wanted], tokens)
    torch.testing.assert_close(masked, sample_divergences(found[:, :3], [wanted[:, :3]]))
    classes = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    other = classes + 0.3 * torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([3, 5])
    by_sample = [sample_divergences(other[i : i + 1, :n], [classes[i : i + 1, :n]]) for i, n in enumerate(lengths)]
    torch.testing.assert_close(
        sample_divergences(other, [classes], torch.arange(5) < lengths[:, None]), torch.cat(by_sample)
    )


def test_of_an_encoder_and_a_decoder_no_layer_is_masked_and_each_layer_is_a_block(make_trainer):
    """The mask is the encoder's; the decoder's tensors may have its shape."""
    tokens = models.padded_tokens()
    batch = {**tokens, "decoder_input_ids": tokens["input_ids"].flip(1)}
    module = calibrated(models.bart(), make_trainer, models.batches_of(batch), observer="minmax")
    spans = {}
    layer = module.network.layers["model.decoder.layers.0.fc1"]
    handle = layer.module.register_forward_pre_hook(lambda m, args: spans.setdefault("seen", args[0]))
    with torch.no_grad(), module.quantized(False):
        module.model(**batch)
    handle.remove()
    assert float(layer.input_quantizers[0].scale) * 255 == pytest.approx(
        float(spans["seen"].max() - spans["seen"].min()), rel=1e-3
    )
    units = [unit.name for unit in find_units(module.network, "block") if "layers" in unit.name]
    assert units == [f"model.{part}.layers.{i}" for part in ("encoder", "decoder") for i in range(2)]
    with torch.no_grad():
        assert len(output_logits(module.model(**batch))) == 1, "the encoder's output is no logit"


def test_classes_that_are_as_many_as_tokens_are_not_taken_for_tokens():
    tokens = torch.tensor([[True, True, False, False]])
    wanted, found = torch.tensor([[0.3, -1.0, 2.0, 1.0]]), torch.tensor([[0.1, -0.5, 1.0, -9.0]])
    alone = sample_divergences({"logits": found}, [wanted])
    assert torch.equal(sample_divergences({"logits": found}, [wanted], tokens), alone)
    assert not torch.equal(sample_divergences({"start_logits": found}, [wanted], tokens), alone)


def test_a_batch_of_nothing_but_padding_is_passed_over(make_trainer):
    batches = models.batches_of(models.padded_tokens())
    empty = {key: value.clone() for key, value in batches[0].items()}
    empty["attention_mask"][:] = 0
    module = calibrated(models.distilbert(), make_trainer, [batches[0], empty, batches[1]], observer="minmax")
    without = calibrated(models.distilbert(), make_trainer, batches[:2], observer="minmax")
    for name, layer in module.network.layers.items():
        for quantizer, other in zip(layer.input_quantizers, without.network.layers[name].input_quantizers, strict=True):
            assert torch.equal(quantizer.scale, other.scale)


def test_fisher_weights_do_not_depend_on_padding(make_trainer):
    errors = []
    for length in (16, 32):
        batches = models.batches_of(padded_to(models.padded_tokens(), length))
        adaquant = AdaQuant(iterations=1, batch_size=4, loss=span_loss)
        module = calibrated(models.bert(), make_trainer, batches, adaquant, weight_bits=4)
        errors.append(module.network.layers["bert.encoder.layer.0.output.dense"].errors[0])
    # If padding counted, it would change by 2 %.
    assert errors[1] == pytest.approx(errors[0], rel=5e-3)


def span_loss(output, batch):
    present = batch["attention_mask"].bool()
    return torch.logsumexp(output.start_logits.masked_fill(~present, -1e9), 1).mean()


def test_padding_of_scores_does_not_count_where_products_are_units(make_trainer):
    errors = []
    for length in (16, 32):
        batches = models.batches_of(padded_to(models.padded_tokens(), length))
        adaquant = AdaQuant(mode="parallel", granularity="layer", iterations=1, batch_size=4)
        module = calibrated(models.bert(), make_trainer, batches, adaquant, weight_bits=4, activation_bits=4)
        layers = [layer for name, layer in module.network.layers.items() if name.endswith("_product")]
        errors.append([layer.errors[0] for layer in layers])
    # If padding counted, each would change by 3 % or more.
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


def test_bias_tuning_leaves_padding_out(make_trainer):
    found = []
    for length in (16, 32):
        tuning = BiasTuning(epochs=1, holdout=0.0)
        batches = models.batches_of(padded_to(models.padded_tokens(), length))
        module = calibrated(models.gpt2(), make_trainer, batches, tuning, weight_bits=3)
        found.append(torch.cat([layer.bias for layer in module.network.layers.values() if layer.bias is not None]))
    assert tuning.result.figures["divergence_after"] < tuning.result.figures["divergence_before"]
    assert float((found[1] - found[0]).abs().median()) < 2e-5
