import contextlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_calibtip import AdaQuant, Calibration, QuantizationModule, RangeOptions
from lightning_calibtip.network.checkpoint import digest_of
from lightning_calibtip.quantization.spec import BitWidths
from tests import transformer_models
from tests.conftest import TinyClassifier, TinyResNet, randomize_batch_norms
from tests.files.flips import try_flips
from tests.networks import as_loader, logits_of


@pytest.fixture
def checkpoint(tiny_classifier, loader, make_trainer, tmp_path):
    module = QuantizationModule(tiny_classifier, weight_bits=3, activation_bits=4, overrides={"net.blocks.0.*": (5, 7)})
    trainer = make_trainer(Calibration(), AdaQuant(iterations=10))
    trainer.fit(module, loader)
    path = tmp_path / "quantized.ckpt"
    trainer.save_checkpoint(path)
    return module, path


def test_reloaded_checkpoint_gives_the_same_logits_bit_for_bit(checkpoint, images):
    module, path = checkpoint
    # The checkpoint is complete: the model that is passed gives the structure only.
    loaded = QuantizationModule.load_from_checkpoint(path, model=TinyClassifier())
    assert torch.equal(logits_of(loaded, images), logits_of(module, images))
    assert sum(line.kind == "quantized" for line in loaded.layer_summary()) == 6
    assert loaded.network.layers["net.blocks.0.conv1"].config.bit_widths == BitWidths(5, 7)


def test_a_reloaded_model_goes_on_to_choose_ranges_as_it_was_calibrated(
    tiny_classifier, loader, make_trainer, tmp_path, caplog
):
    options = RangeOptions("percentile", "minmax", percentile=99.5)
    module, trainer = QuantizationModule(tiny_classifier), make_trainer(Calibration(options))
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "quantized.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=tiny_classifier)
    assert {layer.range_options for layer in loaded.network.layers.values()} == {options}
    # An observer that only the process that calibrated knew.
    saved = torch.load(tmp_path / "quantized.ckpt", weights_only=True)
    saved["calibtip"]["config"]["ranges"]["observer"] = "own"
    config, weights = saved["calibtip"]["config"], saved["calibtip"]["weights"]
    saved["calibtip"]["digest"] = digest_of(config, weights, saved["state_dict"], "model.")
    torch.save(saved, tmp_path / "own.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "own.ckpt", model=tiny_classifier)
    assert {layer.range_options for layer in loaded.network.layers.values()} == {RangeOptions()}
    assert "chosen by the defaults: observer must be" in caplog.text


def test_checkpoint_loads_with_weights_only_and_holds_packed_integers(checkpoint):
    module, path = checkpoint
    saved = torch.load(path, weights_only=True)
    weights = saved["calibtip"]["weights"]
    assert set(weights) == set(module.network.layers)
    for name, layer in module.network.layers.items():
        assert weights[name]["packed"].numel() == (layer.weight.numel() * layer.config.weight.bits + 7) // 8
    assert not any("original" in key for key in saved["state_dict"])


def test_reloaded_module_with_trained_weights_knows_the_float_model(checkpoint, tiny_classifier, images):
    _, path = checkpoint
    loaded = QuantizationModule.load_from_checkpoint(path, model=tiny_classifier)
    with loaded.quantized(False):
        torch.testing.assert_close(logits_of(loaded, images), logits_of(tiny_classifier, images), rtol=1e-4, atol=1e-5)


def test_reloaded_module_can_be_tuned_further(checkpoint, tiny_classifier, loader, make_trainer):
    _, path = checkpoint
    loaded = QuantizationModule.load_from_checkpoint(path, model=tiny_classifier)
    make_trainer(AdaQuant(iterations=5)).fit(loaded, loader)
    assert loaded.network.layers["net.head"].errors is not None


def test_validate_with_ckpt_path_in_a_new_process(checkpoint, loader, make_trainer, tmp_path):
    module, path = checkpoint
    wanted = make_trainer().validate(module, loader, verbose=False)[0]
    torch.save([list(batch) for batch in loader], tmp_path / "batches.pt")
    script = (
        "import sys, torch, lightning.pytorch as pl\n"
        "from tests.conftest import TinyClassifier\n"
        "from lightning_calibtip import QuantizationModule\n"
        "batches = torch.utils.data.DataLoader(torch.load(sys.argv[2]), batch_size=None)\n"
        "trainer = pl.Trainer(accelerator='cpu', logger=False, enable_progress_bar=False)\n"
        "module = QuantizationModule(TinyClassifier(), weight_bits=8)\n"
        "logged = trainer.validate(module, batches, ckpt_path=sys.argv[1], verbose=False)[0]\n"
        "print('LOSS', logged['val_loss'].hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "batches.pt")], capture_output=True, text=True
    )
    assert f"LOSS {wanted['val_loss'].hex()}" in done.stdout, done.stderr


def test_validate_with_ckpt_path_on_the_very_module_restores_it(checkpoint, images, loader, make_trainer):
    module, path = checkpoint
    wanted = logits_of(module, images)
    for layer in module.network.layers.values():
        layer.weight.data.zero_()
    make_trainer().validate(module, loader, ckpt_path=path, verbose=False)
    assert torch.equal(logits_of(module, images), wanted)


def test_checkpoints_of_something_else_are_refused(checkpoint, tiny_classifier, make_trainer, tmp_path, loader):
    _, path = checkpoint
    with pytest.raises(ValueError, match="checkpoint is of another model: this one has no module"):
        QuantizationModule.load_from_checkpoint(path, model=nn.Sequential(nn.Linear(2, 2)), overrides=None)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(tiny_classifier, loader)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="was not saved by a QuantizationModule"):
        make_trainer().validate(QuantizationModule(TinyClassifier()), loader, ckpt_path=tmp_path / "plain.ckpt")
    saved = torch.load(path, weights_only=True)
    saved["calibtip"]["config"]["version"] = 99
    torch.save(saved, tmp_path / "newer.ckpt")
    with pytest.raises(ValueError, match="version 99, this release reads versions 2 and 3"):
        QuantizationModule.load_from_checkpoint(tmp_path / "newer.ckpt", model=TinyClassifier())


def test_saving_before_calibration_and_loading_again_works(tiny_classifier, images, loader, make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.validate(QuantizationModule(tiny_classifier), loader, verbose=False)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "float.ckpt", model=TinyClassifier())
    torch.testing.assert_close(logits_of(loaded, images), logits_of(tiny_classifier, images))


class Tied(nn.Module):
    """An output layer that shares its weight with the embedding, and two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.a, self.b = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)
        self.bn_a, self.bn_b = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.out.weight, self.b.weight = self.embed.weight, self.a.weight

    def forward(self, tokens):
        x = self.embed(tokens).transpose(1, 2)
        return self.out(self.bn_b(self.b(self.bn_a(self.a(x)))).transpose(1, 2))


def test_weights_tied_to_an_embedding_stay_tied_and_others_are_quantized_apart(make_trainer, generator, tmp_path):
    torch.manual_seed(0)
    net, tokens = Tied().eval(), torch.randint(0, 10, (16, 5), generator=generator)
    randomize_batch_norms(net, generator)
    module = QuantizationModule(net, weight_bits=4)
    trainer = make_trainer(Calibration())
    trainer.fit(module, as_loader(tokens))
    with torch.no_grad(), module.quantized(False):
        torch.testing.assert_close(module(tokens), net(tokens), rtol=1e-4, atol=1e-5)
    assert torch.equal(module.model.embed.weight, module.model.out.weight)
    weight_quantizer = module.network.layers["embed"].weight_quantizer
    assert weight_quantizer is not None and len(weight_quantizer.encode(net.embed.weight).unique()) > 1
    assert module.network.layers["out"].weight_quantizer is None
    lines = {line.name: line for line in module.layer_summary()}
    assert "weight of embed" in lines["out"].note and lines["out"].parameters == 0
    assert (lines["out"].weight_bits, lines["out"].activation_bits) == (8, 8)
    assert (lines["embed"].weight_bits, lines["embed"].activation_bits) == (8, None)
    assert "shared parameter" in lines["a"].note + lines["b"].note
    trainer.save_checkpoint(tmp_path / "tied.ckpt")
    saved = torch.load(tmp_path / "tied.ckpt", weights_only=True)
    assert set(saved["calibtip"]["weights"]) == {"embed", "a", "b"}
    assert not [key for key in saved["state_dict"] if key.startswith("model.out.parametrizations")]
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "tied.ckpt", model=Tied())
    loaded_weights = [layer.parametrizations.weight.original for layer in (loaded.model.embed, loaded.model.out)]
    assert loaded_weights[0] is loaded_weights[1]
    with torch.no_grad():
        assert torch.equal(loaded(tokens), module(tokens))


def test_float_output_is_refused_after_loading_into_an_untrained_model(checkpoint, images, loader, make_trainer):
    _, path = checkpoint
    loaded = QuantizationModule.load_from_checkpoint(path, model=TinyClassifier())
    with pytest.raises(RuntimeError, match="float weights are not in a quantized checkpoint"), loaded.quantized(False):
        pass
    with pytest.raises(RuntimeError, match="float weights are not in a quantized checkpoint"):
        make_trainer(AdaQuant(iterations=1)).fit(loaded, loader)


def test_checkpoint_in_another_format_is_taken_over_by_a_calibrated_module(
    checkpoint, tiny_classifier, loader, make_trainer, images
):
    module, path = checkpoint
    other = QuantizationModule(tiny_classifier, symmetric=True, group_size=32, activation_bits=None)
    make_trainer(Calibration()).fit(other, loader)
    make_trainer().validate(other, loader, ckpt_path=path, verbose=False)
    assert torch.equal(logits_of(other, images), logits_of(module, images))
    assert other.network.plan == module.network.plan


def test_calibrated_module_with_other_layers_refuses_a_checkpoint(checkpoint, tiny_classifier, loader, make_trainer):
    _, path = checkpoint
    other = QuantizationModule(tiny_classifier, overrides={"net.stem": None})
    make_trainer(Calibration()).fit(other, loader)
    with pytest.raises(ValueError, match="already quantized, with other layers than the checkpoint's"):
        make_trainer().validate(other, loader, ckpt_path=path, verbose=False)


def test_checkpoint_saved_while_the_float_model_is_shown_holds_the_quantized_one(
    checkpoint, make_trainer, loader, images, tmp_path
):
    module, _ = checkpoint
    wanted = logits_of(module, images)
    trainer = make_trainer()
    with module.quantized(False):
        trainer.validate(module, loader, verbose=False)
        trainer.save_checkpoint(tmp_path / "inside.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "inside.ckpt", model=TinyClassifier())
    assert loaded.network.calibrated
    assert torch.equal(logits_of(loaded, images), wanted)


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    _, path = checkpoint
    saved = torch.load(path, weights_only=True)
    saved["calibtip"]["weights"]["net.head"]["packed"][0] += 1
    torch.save(saved, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match="damaged"):
        QuantizationModule.load_from_checkpoint(tmp_path / "damaged.ckpt", model=TinyClassifier())


@pytest.mark.parametrize(
    "scheme",
    [
        {"weight_bits": 4, "activation_bits": None, "group_size": 32},
        {"weight_bits": None, "activation_bits": 8},
        {"weight_bits": 3, "per_channel": False, "symmetric": True, "activation_symmetric": True},
        {"weight_bits": 4, "per_token": True},
    ],
)
def test_every_scheme_is_reloaded_bit_for_bit(scheme, tiny_classifier, loader, make_trainer, images, tmp_path):
    module = QuantizationModule(tiny_classifier, **scheme)
    trainer = make_trainer(Calibration())
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "scheme.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "scheme.ckpt", model=TinyClassifier())
    assert torch.equal(logits_of(loaded, images), logits_of(module, images))
    assert loaded.network.plan == module.network.plan
    assert loaded.layer_summary() == module.layer_summary()


class Sharing(nn.Module):
    """Layers that share weights, or have one each."""

    def __init__(self, shares):
        super().__init__()
        self.embed, self.a, self.b, self.out = nn.Embedding(11, 7), nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 11)
        if shares:
            self.b.weight, self.out.weight = self.a.weight, self.embed.weight

    def forward(self, tokens):
        return self.out(torch.relu(self.b(torch.relu(self.a(self.embed(tokens))))))


def test_a_checkpoint_of_unshared_weights_loads_into_a_model_that_shares_them(make_trainer, tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (8, 5))
    module = QuantizationModule(Sharing(False).eval(), weight_bits=4)
    trainer = make_trainer(Calibration())
    trainer.fit(module, as_loader(tokens))
    trainer.save_checkpoint(tmp_path / "unshared.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "unshared.ckpt", model=Sharing(True))
    assert torch.equal(logits_of(loaded, tokens), logits_of(module, tokens))


def test_a_checkpoint_from_before_calibration_is_refused_by_a_calibrated_module(
    checkpoint, tiny_classifier, loader, make_trainer, tmp_path, images
):
    module, _ = checkpoint
    wanted = logits_of(module, images)
    trainer = make_trainer()
    trainer.validate(QuantizationModule(tiny_classifier), loader, verbose=False)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    with pytest.raises(ValueError, match="saved before calibration and this model is already quantized"):
        make_trainer().validate(module, loader, ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert module.network.calibrated and torch.equal(logits_of(module, images), wanted)


def test_loading_forgets_what_an_earlier_calibration_has_left(checkpoint, loader, make_trainer):
    module, path = checkpoint
    layer = module.network.layers["net.blocks.1.conv1"]
    layer.variants[layer.config] = layer.save()
    make_trainer().validate(module, loader, ckpt_path=path, verbose=False)
    assert layer.variants == {} and layer.errors is None and not layer.observed
    before = layer.save()
    with pytest.raises(RuntimeError, match="conv1 input: no calibration batch has reached this tensor"):
        module.network.switch(layer.name, BitWidths(8, 8))
    assert layer.config == before.config and torch.equal(layer.weight, before.weight)


def test_float_weights_that_are_not_there_are_not_switched_to(checkpoint, images):
    _, path = checkpoint
    loaded = QuantizationModule.load_from_checkpoint(path, model=TinyClassifier())
    wanted = logits_of(loaded, images)
    for change in (lambda: loaded.network.switch("net.blocks.1.conv1", BitWidths(8, 8)), loaded.network.reset_to_float):
        with pytest.raises(RuntimeError, match="float weights are not in a quantized checkpoint"):
            change()
    assert torch.equal(logits_of(loaded, images), wanted)


def test_a_checkpoint_of_a_layer_of_another_size_is_refused_by_name(checkpoint):
    _, path = checkpoint
    with pytest.raises(ValueError, match=r"its weight of net\.stem has the shape \(6, 1, 3, 3\), this one's \(8, 1"):
        QuantizationModule.load_from_checkpoint(path, model=TinyClassifier(TinyResNet(channels=8)))


VERSION_2 = Path(__file__).parent / "version2"


@pytest.mark.parametrize(
    "name,make_model",
    [
        ("convolutions", TinyClassifier),
        ("tied", Tied),
        ("attention", transformer_models.bert),
        ("per_token", transformer_models.bert),
    ],
)
def test_checkpoint_of_version_2_gives_the_logits_that_it_gave_then(name, make_model):
    """The codec divided by multiplying with a reciprocal then; that, and another CPU's sums, move logits by less than
    1e-5 of their size. Ranges of tokens are taken at run time, so that sums of another CPU may take one activation to
    the next integer: that moves these logits by 1 per cent, and a range read wrongly by far more."""
    loaded = QuantizationModule.load_from_checkpoint(VERSION_2 / f"{name}.ckpt", model=make_model())
    then = torch.load(VERSION_2 / f"{name}.pt", weights_only=True)
    with torch.no_grad():
        output = loaded(**then["inputs"]) if len(then["inputs"]) > 1 else loaded(*then["inputs"].values())
    for got, wanted in ((output[k] if isinstance(output, dict) else output, w) for k, w in then["outputs"].items()):
        if name == "per_token":
            assert (got - wanted).norm() < 0.03 * wanted.norm()
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert any(line.kind == "quantized" for line in loaded.layer_summary())
    if name == "convolutions":
        lines = {line.name: line for line in loaded.layer_summary()}
        assert (lines["net.blocks.0.conv1"].weight_bits, lines["net.blocks.0.conv1"].activation_bits) == (5, 7)
        assert lines["net.blocks.1.conv1"].note == "left float by an override"
        assert lines["net.blocks.0.bn1"].note == "into net.blocks.0.conv1"


def test_flipped_bits_and_cut_files_are_refused_by_name_or_change_nothing(checkpoint, images, tmp_path):
    # More of them: python -m tests.files.flips
    module, path = checkpoint
    outcomes = try_flips(path, TinyClassifier, logits_of(module, images), images, tmp_path, flips=25, cuts=4)
    assert outcomes["changed"] == outcomes["unnamed"] == 0
    assert outcomes["refused"] >= 4


@pytest.mark.parametrize("what, value, message", [
    ("scale", float("nan"), "scale of net.head weight must be from 1.175e-38 to 3.403e.38, got nan to nan"),
    ("scale", 0.0, "must be from 1.175e-38"),
    ("scale", -1.0, "must be from 1.175e-38"),
    ("zero_point", 1e9, "zero_point of net.head weight must be from 0 to 255, got 1e.09"),
])  # fmt: skip
def test_values_that_no_quantizer_has_are_refused_whatever_the_digest_says(checkpoint, tmp_path, what, value, message):
    _, path = checkpoint
    saved = torch.load(path, weights_only=True)
    saved["state_dict"][f"model.net.head.parametrizations.weight.0.{what}"].fill_(value)
    packed = saved["calibtip"]
    packed["digest"] = digest_of(packed["config"], packed["weights"], saved["state_dict"], "model.")
    torch.save(saved, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=message):
        QuantizationModule.load_from_checkpoint(tmp_path / "damaged.ckpt", model=TinyClassifier())


@pytest.mark.parametrize("ruin", [
    lambda packed: packed.pop("config"),
    lambda packed: packed.update(config=None),
    lambda packed: packed.update(weights=None),
    lambda packed: packed["config"].pop("plan"),
    lambda packed: packed["config"].update(plan={}),
    lambda packed: packed["weights"].update(unknown=packed["weights"]["net.head"]),
])  # fmt: skip
def test_a_checkpoint_with_other_contents_is_an_error_that_says_so(checkpoint, tmp_path, ruin):
    _, path = checkpoint
    saved = torch.load(path, weights_only=True)
    packed = saved["calibtip"]
    ruin(packed)
    with contextlib.suppress(Exception):
        packed["digest"] = digest_of(packed["config"], packed["weights"], saved["state_dict"], "model.")
    torch.save(saved, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match="damaged"):
        QuantizationModule.load_from_checkpoint(tmp_path / "damaged.ckpt", model=TinyClassifier())


@pytest.mark.parametrize("content", [b"", b"PK", b"no checkpoint at all", pickle.dumps([1, 2])])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.ckpt is damaged, or no checkpoint|This checkpoint was not saved"):
        QuantizationModule.load_from_checkpoint(tmp_path / "x.ckpt", model=TinyClassifier())
    with pytest.raises(FileNotFoundError):
        QuantizationModule.load_from_checkpoint(tmp_path / "missing.ckpt", model=TinyClassifier())
