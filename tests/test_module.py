import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibtip import (
    AdaQuant,
    BiasTuning,
    Calibration,
    QuantizationModule,
    QuantizationScheme,
    export_onnx,
    quantize,
)
from tests.conftest import TinyClassifier, TinyResNet
from tests.networks import as_loader, logits_of


@pytest.fixture
def calibrated(tiny_classifier, loader, make_trainer):
    module = QuantizationModule(tiny_classifier, weight_bits=4, activation_bits=4)
    make_trainer(Calibration()).fit(module, loader)
    return module


def test_original_model_stays_untouched(tiny_classifier, loader, make_trainer):
    before = copy.deepcopy(tiny_classifier.state_dict())
    tiny_classifier.train()
    module = QuantizationModule(tiny_classifier, weight_bits=4)
    make_trainer(Calibration(), AdaQuant(iterations=5)).fit(module, loader)
    after = tiny_classifier.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert tiny_classifier.training and all(p.requires_grad for p in tiny_classifier.parameters())
    assert type(tiny_classifier.net.stem) is nn.Conv2d


def test_users_steps_and_hooks_log_through_the_trainer(calibrated, tiny_classifier, loader, make_trainer):
    logged = make_trainer().validate(calibrated, loader, verbose=False)[0]
    assert set(logged) == {"val_loss", "val_acc", "epoch_ends"}
    wanted = make_trainer().validate(tiny_classifier, loader, verbose=False)[0]
    assert logged["val_loss"] == pytest.approx(wanted["val_loss"], rel=0.3)
    assert logged["val_loss"] != wanted["val_loss"]


def test_steps_with_a_dataloader_index_and_several_loaders_work(calibrated, loader, make_trainer):
    logged = make_trainer().validate(calibrated, [loader, loader], verbose=False)
    assert len(logged) == 2 and "val_acc/dataloader_idx_1" in logged[1]


def test_test_and_predict_steps_are_the_users(loader, images, make_trainer):
    class Full(TinyClassifier):
        def test_step(self, batch, batch_idx):
            self.log("test_only", 7.0)

        def predict_step(self, batch, batch_idx):
            return self(batch[0]).argmax(1)

    module = QuantizationModule(Full())
    make_trainer(Calibration()).fit(module, loader)
    assert make_trainer().test(module, loader, verbose=False)[0] == {"test_only": 7.0}
    predicted = torch.cat(make_trainer().predict(module, loader))
    assert torch.equal(predicted, logits_of(module, images).argmax(1))


def test_users_own_dataloaders_are_used(images, make_trainer):
    class WithData(TinyClassifier):
        def val_dataloader(self):
            return DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.int64)), 8)

    assert "val_loss" in make_trainer().validate(QuantizationModule(WithData()), verbose=False)[0]


def test_forward_takes_any_signature():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, a, *rest, factor=1, **more):
            return self.fc(a) * factor + sum(rest) + more.get("shift", 0)

    net = Odd()
    module, x = QuantizationModule(net), torch.ones(1, 2)
    torch.testing.assert_close(module(x, 1, 2, factor=3, shift=4), net(x, 1, 2, factor=3, shift=4))


def test_plain_module_with_a_validation_step(tiny_resnet, loader, make_trainer):
    def validation_step(module, batch, batch_idx):
        module.log("agreement", (module(batch[0]).argmax(1) == batch[1]).float().mean())

    module = QuantizationModule(tiny_resnet, validation_step=validation_step)
    make_trainer(Calibration()).fit(module, loader)
    assert 0 <= make_trainer().validate(module, loader, verbose=False)[0]["agreement"] <= 1


def test_module_without_a_step_says_what_to_pass(tiny_resnet, loader, make_trainer):
    with pytest.raises(NotImplementedError, match="TinyResNet has no validation_step; pass validation_step="):
        make_trainer().validate(QuantizationModule(tiny_resnet), loader, verbose=False)


@pytest.mark.parametrize("kind", ["tensor", "list", "mapping"])
def test_calibration_batches_of_each_kind_become_a_forward_call(kind, images, make_trainer):
    class Named(TinyResNet):
        def forward(self, pixels, mask=None):
            return super().forward(pixels)

    batches = {
        "tensor": [images],
        "list": [[images, "no label"]],
        "mapping": [{"pixels": images, "labels": torch.zeros(len(images))}],
    }[kind]
    module = QuantizationModule(Named())
    make_trainer(Calibration(observer="minmax")).fit(module, as_loader(*batches))
    reach = module.network.layers["stem"].input_quantizers[0].step_size() * 255
    assert reach == pytest.approx(float(images.max() - images.min()), rel=1e-3)


def test_mapping_without_a_name_that_forward_takes_is_an_error(images, make_trainer):
    with pytest.raises(ValueError, match=r"No entry of the calibration batch \(pictures\) is an argument of"):
        make_trainer(Calibration()).fit(QuantizationModule(TinyResNet()), as_loader({"pictures": images}))


def test_calibration_step_can_be_overridden(images, make_trainer):
    class Halved(QuantizationModule):
        def calibration_step(self, batch, batch_idx):
            return self.model(batch["deep"]["pixels"] / 2)

    module = Halved(TinyResNet())
    make_trainer(Calibration(observer="minmax")).fit(module, as_loader({"deep": {"pixels": images}}))
    reach = module.network.layers["stem"].input_quantizers[0].step_size() * 255
    assert reach == pytest.approx(float(images.max() - images.min()) / 2, rel=1e-3)


def test_only_calibration_batches_move_observers(tiny_classifier, loader, images, make_trainer):
    far = DataLoader(TensorDataset(images * 1000, torch.zeros(len(images), dtype=torch.int64)), 16)
    scales = []
    for options in ({"val_dataloaders": far}, {}):
        module = QuantizationModule(tiny_classifier)
        make_trainer(Calibration(), num_sanity_val_steps=2).fit(module, loader, **options)
        scales.append([layer.input_quantizers[0].step_size() for layer in module.network.layers.values()])
    assert scales[0] == scales[1]


def test_dropout_and_left_over_batch_norm_do_not_move(loader, images, make_trainer):
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 3, 3), nn.Dropout(0.9), nn.Flatten(), nn.Linear(108, 4))
    module = QuantizationModule(net)
    module.train()
    make_trainer(Calibration()).fit(module, loader)
    assert torch.equal(module.model[0].running_mean, torch.zeros(1))
    assert torch.equal(logits_of(module, images), logits_of(module, images))
    notes = {line.name: line.note for line in module.layer_summary() if line.kind == "float"}
    assert "no convolution or linear layer" in notes["0"]


def test_one_epoch_calibrates_whatever_max_epochs_says(tiny_classifier, loader, make_trainer):
    trainer = make_trainer(Calibration(), max_epochs=50)
    trainer.fit(QuantizationModule(tiny_classifier), loader)
    assert trainer.current_epoch == 1


def test_no_calibration_batch_is_an_error(tiny_classifier, make_trainer):
    with pytest.raises(RuntimeError, match="calibration set is empty"):
        make_trainer(Calibration()).fit(QuantizationModule(tiny_classifier), as_loader())


def test_nan_batch_is_an_error_that_names_it(tiny_classifier, images, make_trainer):
    bad = images.clone()
    bad[3] = float("nan")
    with pytest.raises(ValueError, match=r"Calibration batch 1: input.* holds NaN or infinity"):
        make_trainer(Calibration()).fit(QuantizationModule(tiny_classifier), as_loader([images], [bad]))


def test_quantization_module_cannot_be_wrapped_again(calibrated):
    with pytest.raises(ValueError, match="already a QuantizationModule"):
        QuantizationModule(calibrated)
    with pytest.raises(ValueError, match="already quantized"):
        QuantizationModule(calibrated.model)


def test_quantized_false_gives_the_float_output_also_after_reconstruction(
    tiny_classifier, images, loader, make_trainer
):
    module = QuantizationModule(tiny_classifier, weight_bits=2, activation_bits=4)
    make_trainer(Calibration(), AdaQuant(iterations=20), BiasTuning(epochs=1, holdout=0)).fit(module, loader)
    wanted = logits_of(tiny_classifier, images)
    with module.quantized(False):
        torch.testing.assert_close(logits_of(module, images), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(module, images), wanted, atol=1e-3)


def test_deep_copy_is_independent(calibrated, images):
    wanted = logits_of(calibrated, images)
    duplicate = copy.deepcopy(calibrated)
    for layer in duplicate.network.layers.values():
        layer.weight.data.zero_()
    assert torch.equal(logits_of(calibrated, images), wanted)
    assert not torch.equal(logits_of(duplicate, images), wanted)


def test_summary_is_printed_with_every_layer(calibrated, capsys):
    calibrated.print_summary()
    printed = capsys.readouterr().out
    assert "net.blocks.1.conv2" in printed and "6 quantized, 5 folded, 0 float" in printed


def test_model_attached_to_a_trainer_is_copied_without_it(tiny_classifier, loader, make_trainer):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(tiny_classifier, loader)
    module = QuantizationModule(tiny_classifier)
    assert module.model._trainer is None and tiny_classifier.trainer is trainer


def test_bfloat16_autocast_of_the_trainer_is_honoured(tiny_classifier, images, loader, make_trainer):
    seen = []
    module = QuantizationModule(tiny_classifier)
    module.model.net.head.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    make_trainer(Calibration(), AdaQuant(iterations=3), precision="bf16-mixed").fit(module, loader)
    assert torch.bfloat16 in seen
    assert torch.isfinite(F.softmax(logits_of(module, images), -1)).all()


def test_half_precision_weights_are_refused(tiny_classifier, loader, make_trainer):
    with pytest.raises(MisconfigurationException, match=r"Calibration needs float32 weights, got .*bf16-true"):
        make_trainer(Calibration(), precision="bf16-true").fit(QuantizationModule(tiny_classifier), loader)


def test_step_without_batch_idx_works(loader, make_trainer):
    class Short(TinyClassifier):
        def validation_step(self, batch):
            self.log("short", self(batch[0]).mean())

    assert "short" in make_trainer().validate(QuantizationModule(Short()), loader, verbose=False)[0]


def test_parametrized_original_still_works_after_its_copy_was_quantized(images, loader, make_trainer):
    net = TinyResNet()
    torch.nn.utils.parametrizations.weight_norm(net.blocks[0].conv1)
    net.eval()
    wanted = net(images)
    module = QuantizationModule(net)
    make_trainer(Calibration()).fit(module, loader)
    assert torch.equal(net(images), wanted)
    assert "blocks.0.conv1" in module.network.layers
    with module.quantized(False):
        torch.testing.assert_close(module(images), wanted, rtol=1e-4, atol=1e-5)


def test_layers_of_other_types_are_listed_as_float(make_trainer, images):
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.norm(x[:, 0, -1]))

    module = QuantizationModule(Normalized())
    make_trainer(Calibration()).fit(module, as_loader(images))
    lines = {line.name: line for line in module.layer_summary()}
    assert lines["norm"].kind == "float" and lines["norm"].parameters == 2 * 8
    assert set(lines) == {"norm", "head"}


def test_nan_in_labels_does_not_matter(tiny_classifier, images, make_trainer):
    batch = [images, torch.full((len(images),), float("nan"))]
    module = QuantizationModule(tiny_classifier)
    make_trainer(Calibration()).fit(module, as_loader(batch))
    assert module.network.calibrated


def test_min_epochs_does_not_run_a_stage_twice(tiny_classifier, loader, make_trainer):
    runs = []

    class Counting(Calibration):
        def run(self, module):
            runs.append(module.calibration.samples)
            return super().run(module)

    trainer = make_trainer(Counting(), min_epochs=2)
    module = QuantizationModule(tiny_classifier)
    trainer.fit(module, loader)
    assert runs == [48]


def test_fields_of_the_scheme_are_given_by_name_or_as_a_scheme(tiny_resnet):
    scheme = QuantizationScheme(weight_bits=3, symmetric=True)
    module = QuantizationModule(tiny_resnet, scheme, activation_bits=None)
    assert module.network.scheme == replace(scheme, activation_bits=None)
    assert dict(module.hparams) == module.network.scheme.to_dict()


def test_wrong_settings_are_named(tiny_resnet):
    with pytest.raises(TypeError, match="QuantizationModule: unknown option 'weight_bit'; did you mean 'weight_bits'"):
        QuantizationModule(tiny_resnet, weight_bit=4)
    with pytest.raises(TypeError, match=r"scheme must be a QuantizationScheme, got 4; .* weight_bits=4"):
        QuantizationModule(tiny_resnet, 4)
    with pytest.raises(ValueError, match="weight_bits must be"):
        QuantizationModule(tiny_resnet, weight_bits=1)


def test_a_checkpoint_is_loaded_with_the_scheme_that_it_was_saved_with(tiny_classifier, loader, images, tmp_path):
    run = quantize(tiny_classifier, loader, pipeline="calibrate", weight_bits=4, activation_bits=None, group_size=4)
    run.save(tmp_path / "quantized.ckpt")
    loaded = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=TinyClassifier())
    assert loaded.hparams == run.module.hparams == run.module.network.scheme.to_dict()
    assert torch.equal(logits_of(loaded, images), logits_of(run.module, images))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, left, right, scale=1.0):
        return self.left(left) + scale * self.right(right)


class OfMapping(Pair):
    def forward(self, batch):
        return super().forward(batch["left"], batch["right"])


class WithStep(OfMapping):
    def calibration_step(self, batch, batch_idx):
        (pair,) = batch
        return self({"left": pair[0], "right": pair[1]})

    def forward(self, sample):
        return super().forward(sample)


@pytest.mark.parametrize("model", [Pair, OfMapping, WithStep])
def test_batches_of_several_inputs_reach_forward(model):
    left, right = torch.randn(8, 4), torch.randn(8, 4) * 9
    batch = {Pair: (left, right, "labels"), OfMapping: {"left": left, "right": right}, WithStep: [(left, right)]}[model]
    net = model().eval()
    run = quantize(net, [batch], pipeline="calibrate", trainer_options={"accelerator": "cpu"}, edge_bits=None)
    read = {tensor.name: float(tensor.observer.row[2]) for tensor in run.module.network.tensors if tensor.observer}
    assert read == {"left input": float(left.max()), "right input": float(right.max())}


def test_what_the_model_raises_names_the_batch_and_a_compiled_model_is_the_one_that_was_compiled():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        RuntimeError, match=r"failed on the first calibration batch \(float32 \(8, 5\)\): mat1 and mat2"
    ):
        quantize(net, [torch.randn(8, 5)], pipeline="calibrate", trainer_options={"accelerator": "cpu"})
    compiled = torch.compile(net)
    net.compile()
    run = quantize(compiled, [torch.randn(8, 4)], pipeline="calibrate", trainer_options={"accelerator": "cpu"})
    assert list(run.module.network.layers) == ["0", "2"] and net._compiled_call_impl is not None


def test_what_is_no_quantized_module_or_checkpoint_says_so(tiny_classifier, tmp_path, make_trainer):
    with pytest.raises(TypeError, match="export_onnx takes a QuantizationModule, got a Linear"):
        export_onnx(nn.Linear(2, 2), tmp_path / "model.onnx", torch.ones(1, 2))
    trainer = make_trainer()
    trainer.strategy.connect(tiny_classifier)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(ValueError, match=r"float.ckpt was not saved by a QuantizationModule"):
        QuantizationModule.load_from_checkpoint(tmp_path / "float.ckpt", model=tiny_classifier)
    with pytest.raises(TypeError, match="weight_bits is given by the checkpoint"):
        QuantizationModule.load_from_checkpoint(tmp_path / "float.ckpt", model=tiny_classifier, weight_bits=4)
