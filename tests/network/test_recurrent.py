"""Recurrent layers: their weights and what they read are quantized, in whatever form the user calls them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_calibtip import Calibration, QuantizationModule, export_onnx, quantize
from lightning_calibtip.export.packed import export_packed, load_packed
from lightning_calibtip.network.recurrent import hold_recurrent_weights
from lightning_calibtip.report.size import model_size
from tests.networks import as_loader

W4 = {"weight_bits": 4, "activation_bits": None, "edge_bits": None}
LENGTHS = torch.tensor([3, 5, 2, 5])


class Classifier(nn.Module):
    """Two bidirectional layers over padded or packed sequences."""

    def __init__(self, kind=nn.LSTM, packs=True, **options):
        super().__init__()
        self.packs = packs
        self.rnn = kind(6, 5, 2, batch_first=True, bidirectional=True, **options)
        self.head = nn.Linear(2 * (options.get("proj_size") or 5), 3)

    def forward(self, x):
        if self.packs:
            lengths = LENGTHS.repeat(len(x) // len(LENGTHS))
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, _ = self.rnn(x)
        if self.packs:
            output, _ = pad_packed_sequence(output, batch_first=True)
        return self.head(output[:, 0] + output[:, -1])


class Stepping(nn.Module):
    """A cell, step by step."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


NETS = {
    "LSTM": lambda: Classifier(),
    "projected LSTM": lambda: Classifier(proj_size=4),
    "GRU without biases": lambda: Classifier(nn.GRU, packs=False, bias=False),
    "RNN": lambda: Classifier(nn.RNN, packs=False),
    "LSTMCell": lambda: Stepping(nn.LSTMCell),
    "GRUCell": lambda: Stepping(nn.GRUCell),
}


def make(kind):
    torch.manual_seed(0)
    net = NETS[kind]().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def calibrated(net, make_trainer, batches, **options):
    module = QuantizationModule(net, **options)
    make_trainer(Calibration()).fit(module, as_loader(*batches))
    return module


@pytest.fixture
def batches(generator):
    return [torch.randn(8, 5, 6, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("kind", NETS)
def test_the_output_is_that_of_a_float_copy_with_rounded_weights(kind, make_trainer, batches):
    net = make(kind)
    module = calibrated(copy.deepcopy(net), make_trainer, batches, **W4)
    names = [name for name in net.state_dict() if ".weight_" in name]
    assert names == [name.removesuffix("_matrix") for name in module.network.layers if name.endswith("_matrix")]
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "bias" not in name:
                place = name.removesuffix(".weight") if name.startswith("head") else f"{name}_matrix"
                quantizer = module.network.layers[place].weight_quantizer
                scale, zero = quantizer.scale[:, None], quantizer.zero_point[:, None]
                assert len(scale) == len(parameter)
                parameter.copy_((torch.clamp((parameter / scale).round() + zero, 0, 15) - zero) * scale)
        for x in batches:
            torch.testing.assert_close(module(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU without biases", "LSTMCell"])
def test_what_they_read_is_quantized_and_nothing_else_is_a_float_product(kind, make_trainer, batches):
    module = calibrated(make(kind), make_trainer, batches, weight_bits=8, activation_bits=8)
    assert module.network.plan.float_matmuls == {}
    child = "cell" if kind == "LSTMCell" else "rnn"
    lines = {line.name: line for line in module.layer_summary()}
    assert lines[f"{child}.sequence"].activation_bits == 8
    # It is at work: with steps that are too great, the output is another one.
    site = module.network.layers[f"{child}.sequence"].input_quantizers[0]
    with torch.no_grad():
        before = module(batches[0])
        site.scale.mul_(50)
        assert float((module(batches[0]) - before).norm() / before.norm()) > 0.05
    if kind != "GRU without biases":
        assert lines[child].note == "its hidden states and its biases stay float" and lines[child].kind == "float"


def test_a_checkpoint_and_a_packed_file_compute_the_same_bits(make_trainer, batches, tmp_path):
    net = make("LSTM")
    module = QuantizationModule(copy.deepcopy(net), weight_bits=4, activation_bits=8)
    trainer = make_trainer(Calibration())
    trainer.fit(module, as_loader(*batches))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    path = export_packed(module, tmp_path / "model.safetensors")
    reloaded = QuantizationModule.load_from_checkpoint(tmp_path / "model.ckpt", model=copy.deepcopy(net))
    unpacked = load_packed(path, make("LSTM"))
    with torch.no_grad():
        for x in batches:
            assert torch.equal(reloaded(x), module(x)) and torch.equal(unpacked(x), module(x))
    assert set(module.model.state_dict()) == set(reloaded.model.state_dict())
    assert "rnn.weight_hh_l1_reverse_matrix.parametrizations.weight.original" in module.model.state_dict()
    assert "rnn.bias_hh_l0" in module.model.state_dict() and isinstance(module.model.rnn, nn.LSTM)


def test_weights_take_their_bits_in_a_model_of_recurrent_layers(make_trainer, generator):
    net = nn.Sequential(nn.LSTM(16, 64, batch_first=True))
    module = calibrated(net, make_trainer, [torch.randn(4, 3, 16, generator=generator)], **W4)
    weights = 4 * 64 * (16 + 64)
    size = model_size(module.network)
    # Half a byte each; a scale and a zero point for each row of two matrices; and two float biases.
    assert size.quantized_bytes == weights // 2 + 2 * (4 * 64) * 8 + 2 * (4 * 64) * 4


@pytest.mark.parametrize("kind", ["LSTM", "GRU without biases"])
def test_adaquant_makes_the_recurrent_layer_better(kind, generator):
    net, options = make(kind), {"adaquant": {"iterations": 60}}
    # Inputs of two dimensions, in six channels.
    base = torch.randn(2, 6, generator=generator)
    batches = [torch.randn(8, 5, 2, generator=generator) @ base for _ in range(16)]
    wanted, errors = [net(x).detach() for x in batches], {}
    for pipeline in ("calibrate", "sequential"):
        trainer_options = {"accelerator": "cpu"}
        run = quantize(
            copy.deepcopy(net), batches, pipeline=pipeline, **W4, options=options, trainer_options=trainer_options
        )
        with torch.no_grad():
            errors[pipeline] = sum(
                float((run.module(x) - y).square().sum()) for x, y in zip(batches, wanted, strict=True)
            )
    before, after = run.module.network.layers["rnn.weight_hh_l0_matrix"].errors
    assert after < before and errors["sequential"] < errors["calibrate"]


def test_the_float_model_and_its_state_dict_stay_the_same(batches):
    net = make("LSTM")
    state, wanted = copy.deepcopy(net.state_dict()), net(batches[0])
    held = make("LSTM")
    with torch.no_grad():
        for parameter in held.parameters():
            parameter.zero_()
    hold_recurrent_weights(held)
    held.load_state_dict(state)
    assert torch.equal(held(batches[0]), wanted) and torch.equal(copy.deepcopy(held)(batches[0]), wanted)
    assert torch.equal(held.rnn.weight_ih_l1, net.rnn.weight_ih_l1)
    held(batches[0]).sum().backward()
    assert float(held.rnn.weight_hh_l0_matrix.weight.grad.abs().sum()) > 0


def test_overrides_name_single_weights(make_trainer, batches):
    module = calibrated(make("LSTM"), make_trainer, batches, **W4, overrides={"rnn.weight_hh*": 8, "*_l0_*": None})
    bits = {name: layer.config.bit_widths.weight for name, layer in module.network.layers.items()}
    assert bits["rnn.weight_hh_l1_matrix"] == 8 and bits["rnn.weight_ih_l1_matrix"] == 4
    assert "rnn.weight_ih_l0_matrix" in module.network.float_layers


def test_a_file_for_onnx_runtime_has_integer_weights_and_says_that_the_layer_is_float(tmp_path, generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.LSTM(16, 48, batch_first=True), Last(), nn.Linear(48, 3))
    batch = torch.randn(8, 5, 16, generator=generator)
    options = {"target": "onnxruntime", "trainer_options": {"accelerator": "cpu"}}
    run = quantize(net, [batch], pipeline="calibrate", **options)
    report = export_onnx(run.module, tmp_path / "model.onnx", batch)
    assert report.float_layers == ["0"] and report.counts == {"LSTM": 1, "QGemm": 1}
    assert report.size_ratio < 0.5 and report.difference < 1e-4 and report.agreement == 1


class Last(nn.Module):
    def forward(self, outputs):
        return outputs[0][:, -1]
