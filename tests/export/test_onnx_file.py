import copy
import sys
from collections import Counter

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_calibtip import AdaQuant, QuantizationModule, Target, export_onnx, quantize, register_target
from lightning_calibtip.export.engine import make_session, run_session
from tests.export.exporting import Residual, operators, outputs, quantized
from tests.networks import as_loader

# Sums in float32 come out otherwise in the engine's integers; one that lies at the edge of a step is then rounded the
# other way, and a step of 8 bits is 1/255 of a range. So are those that follow from it, hence a few steps.
STEPS = 6 / 255


@pytest.fixture
def images():
    return torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def module(images):
    torch.manual_seed(0)
    return quantized(Residual(), images)


def test_convolutions_sums_and_pools_run_as_integers(module, images, tmp_path):
    report = export_onnx(module, tmp_path / "net.onnx", images)
    assert report.counts == {"QLinearConv": 6, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1}
    assert report.float_layers == [] and report.difference < STEPS and report.agreement > 0.9
    assert report.file_bytes == (tmp_path / "net.onnx").stat().st_size and report.latency > 0
    assert "2 QLinearAdd" in str(report) and f"{report.file_bytes:,} bytes" in str(report)


def test_the_file_is_plain_onnx_with_a_free_number_of_samples(module, images, tmp_path):
    export_onnx(module, tmp_path / "net.onnx", images, check=False)
    model = onnx.load(str(tmp_path / "net.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.metadata_props and not any(node.metadata_props or node.doc_string for node in model.graph.node)
    uses = Counter(name for node in model.graph.node for name in node.input)
    assert all(uses[tensor.name] == 1 for tensor in model.graph.initializer)
    for samples in (1, 7):
        wanted = module.model(images[:samples])
        (given,) = outputs(tmp_path / "net.onnx", images[:samples])
        assert given.shape == wanted.shape and (given - wanted).abs().max() < STEPS * wanted.abs().max()


def test_without_optimisations_the_engine_computes_what_torch_computes(images, tmp_path):
    # One layer: nothing that is rounded otherwise is amplified by what follows.
    module = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images)
    export_onnx(module, tmp_path / "conv.onnx", images, check=False)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "conv.onnx"), options, providers=["CPUExecutionProvider"])
    given = torch.from_numpy(run_session(session, {session.get_inputs()[0].name: images.numpy()})[0])
    step = float(module.network.layers["0"].output_quantizer.scale)
    steps = (given - module.model(images)).abs() / step
    assert steps.max() < 1.01 and (steps > 0.5).double().mean() < 1e-3


class Limited(nn.Module):
    """A convolution between limits that are given by functions, which exporters write in several ways."""

    def __init__(self, limit):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.limit = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), limit

    def forward(self, x):
        return self.second(self.limit(self.first(x)))


@pytest.mark.parametrize(
    "limit",
    [
        lambda x: torch.minimum(torch.relu(x), torch.tensor(0.5)),
        lambda x: torch.maximum(x.clamp_max(0.5), torch.tensor(-0.25)),
        lambda x: torch.relu(x).clamp(max=0.5),
        F.relu6,
    ],
)
def test_limits_become_those_of_the_integers(images, tmp_path, limit):
    module = quantized(Limited(limit), images)
    report = export_onnx(module, tmp_path / "net.onnx", images)
    assert report.counts == {"QLinearConv": 2} and report.difference < STEPS
    assert not {"Relu", "Min", "Max"} & set(operators(tmp_path / "net.onnx"))


def test_limits_that_are_no_constants_stay(images, tmp_path):
    module = quantized(Limited(lambda x: torch.minimum(x, x.mean())), images)
    report = export_onnx(module, tmp_path / "net.onnx", images)
    assert operators(tmp_path / "net.onnx").count("Min") == 1 and report.difference < STEPS


def test_exporting_leaves_the_module_as_it_is(module, images, tmp_path):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    types = [type(each) for each in module.modules()]
    wanted = module.model(images)
    export_onnx(module, tmp_path / "net.onnx", images)
    assert types == [type(each) for each in module.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(module.model(images), wanted)
    with module.quantized(False):
        export_onnx(module, tmp_path / "float.onnx", images)
    assert (tmp_path / "net.onnx").read_bytes() == (tmp_path / "float.onnx").read_bytes()


@pytest.mark.parametrize("weight_bits, activation_bits", [(8, 8), (4, 8), (3, 8), (2, 6), (8, 4)])
def test_every_bit_width_is_exact_in_its_container(images, weight_bits, activation_bits, tmp_path):
    module = quantized(Residual(), images, weight_bits=weight_bits, activation_bits=activation_bits)
    export_onnx(module, tmp_path / "net.onnx", images, check=False)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "net.onnx")).graph.initializer}
    for name, layer in module.network.layers.items():
        if layer.weight_quantizer is not None:
            stored = torch.from_numpy(weights[f"{name}.weight"].copy())
            assert stored.dtype == torch.int8 and torch.equal(stored.int(), layer.integer_weight())
    if activation_bits < 8:
        assert "Clip" in operators(tmp_path / "net.onnx")
    wanted = module.model(images)
    (given,) = outputs(tmp_path / "net.onnx", images)
    # A step of fewer bits is a larger part of the range.
    assert (given - wanted).abs().mean() < 2**-activation_bits * wanted.abs().max()


def test_weights_of_4_bits_take_half_the_space(images, tmp_path):
    module = quantized(Residual(), images, weight_bits=4, edge_bits=None)
    eight = export_onnx(module, tmp_path / "eight.onnx", images, check=False)
    four = export_onnx(module, tmp_path / "four.onnx", images, check=False, int4=True)
    weights = sum(layer.weight.numel() for layer in module.network.layers.values())
    assert eight.file_bytes - four.file_bytes > 0.4 * weights
    (packed,), (plain,) = outputs(tmp_path / "four.onnx", images), outputs(tmp_path / "eight.onnx", images)
    # The engine takes weights of 4 bits apart and computes in float.
    assert (packed - plain).abs().max() < STEPS * plain.abs().max()


def test_weights_alone_in_groups_keep_the_numbers(images, tmp_path):
    options = {"target": "weights", "weight_bits": 4, "activation_bits": None, "group_size": 32, "edge_bits": None}
    module = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)), images, **options)
    for int4 in (False, True):
        report = export_onnx(module, tmp_path / "net.onnx", images, int4=int4)
        # Only the order of the sums is another one.
        assert report.difference < 1e-5 and "QuantizeLinear" not in operators(tmp_path / "net.onnx")


class Words(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, size), nn.Linear(size, 40, bias=False)
        self.hidden = nn.Linear(size, size)

    def forward(self, tokens):
        return self.head(F.gelu(self.hidden(self.embed(tokens))))


@pytest.mark.parametrize("options", [
    {"target": None}, {"target": "onnxruntime"},
    {"target": "weights", "activation_bits": None, "group_size": 5, "weight_bits": 4},
])  # fmt: skip
def test_embeddings_are_looked_up_as_integers(options, tmp_path):
    tokens = torch.randint(0, 40, (8, 6), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = quantized(Words(), tokens, **options)
    report = export_onnx(module, tmp_path / "words.onnx", tokens, dynamic=True)
    lookup = next(line for line in report.operators if line.layer == "embed")
    assert lookup.operator == "Gather" and lookup.integer
    assert report.difference < (STEPS if options["target"] != "weights" else 1e-5)
    # Tokens and samples are free.
    (given,) = outputs(tmp_path / "words.onnx", tokens[:3, :4])
    assert given.shape == (3, 4, 40)


def test_tied_weights_are_exported_for_both_layers(tmp_path):
    model = Words()
    model.head.weight = model.embed.weight
    tokens = torch.randint(0, 40, (8, 6))
    module = quantized(model, tokens)
    assert module.network.plan.tied == {"head": "embed"}
    report = export_onnx(module, tmp_path / "tied.onnx", tokens)
    assert report.difference < STEPS and {line.layer for line in report.operators} == {"embed", "head", "hidden"}


def test_reconstructed_modules_are_exported_as_they_are_validated(images, make_trainer, tmp_path):
    torch.manual_seed(0)
    run = quantize(
        Residual(), [images], pipeline="sequential", target="onnxruntime", weight_bits=4,
        options={"adaquant": {"iterations": 20, "batch_size": 8}}, trainer_options={"accelerator": "cpu"},
    )  # fmt: skip
    report = run.export_onnx(tmp_path / "net.onnx")
    assert report.agreement > 0.9 and report.difference < 2 * STEPS
    record = run.record("test", "Residual", None, 0)
    assert record["exports"][0]["counts"]["QLinearAdd"] == 2 and "export" in record["report_items"]
    run.write_report(tmp_path / "report", record)
    assert "QLinearConv" in (tmp_path / "report" / "export.csv").read_text()


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out = nn.Conv2d(16, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        first = torch.relu(self.down1(x))
        second = torch.relu(self.down2(F.max_pool2d(first, 2)))
        second = F.interpolate(second, scale_factor=2, mode="nearest")
        out = F.pad(torch.cat([first, second], 1), (1, 1, 1, 1), mode="reflect")
        return self.out(torch.relu(self.up(out)))


def test_joins_upsampling_and_padding_keep_the_grid(images, tmp_path):
    torch.manual_seed(0)
    module = quantized(UNet(), images)
    report = export_onnx(module, tmp_path / "unet.onnx", images)
    assert report.counts == {"QLinearConv": 4} and report.difference < STEPS


@pytest.mark.parametrize("weight_bits, activation_bits", [(2, 8), (4, 4)])
def test_a_module_without_a_target_keeps_its_biases(weight_bits, activation_bits, images, tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    module = quantized(
        Residual(), images, target=None, symmetric=True, weight_bits=weight_bits, activation_bits=activation_bits
    )
    export_onnx(module, tmp_path / "net.onnx", images, check=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    given = torch.from_numpy(run_session(session, {session.get_inputs()[0].name: images.numpy()})[0])
    biases = [t for t in onnx.load(str(tmp_path / "net.onnx")).graph.initializer if t.name.endswith(".bias")]
    assert biases and {tensor.data_type for tensor in biases} == {onnx.TensorProto.FLOAT}
    # A sum at the edge of a step, of a quarter of the images at most.
    same = (given - module.model(images)).abs().amax(1) < 1e-4
    assert same.double().mean() > 0.75
    with pytest.raises(ValueError, match="was calibrated without target='onnxruntime', which adds integers"):
        export_onnx(module, tmp_path / "ort.onnx", images, "onnxruntime")


def test_below_8_bits_convolutions_are_integers_still(images, tmp_path):
    report = export_onnx(quantized(Residual(), images, activation_bits=5), tmp_path / "net.onnx", images)
    assert report.counts["QLinearConv"] == 6


def test_pools_whose_windows_hang_over_are_not_quantized_and_large_differences_are_told(images, tmp_path, caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(3, 2, ceil_mode=True), nn.Conv2d(8, 4, 1))
    module = quantized(model, images)
    assert list(module.network.layers) == ["0", "2"]
    # ONNX Runtime makes an integer pool of it nevertheless, which divides by another number of elements.
    report = export_onnx(module, tmp_path / "net.onnx", images)
    assert (report.difference > 0.1) == ("differs from torch" in caplog.text)


def test_a_failing_check_writes_nothing(images, tmp_path):
    module = quantized(Residual(), images, target=None, weight_bits=12, activation_bits=12)
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot run the file .*check=False writes it"):
        export_onnx(module, tmp_path / "net.onnx", images)
    assert not list(tmp_path.iterdir())
    assert export_onnx(module, tmp_path / "net.onnx", images, check=False).operators == ()


def test_half_precision_is_refused_by_name(images, tmp_path):
    module = quantized(Residual(), images)
    module.model.head.double()
    with pytest.raises(ValueError, match=r"parameters of the type float64; .* model.float\(\)"):
        export_onnx(module, tmp_path / "net.onnx", images.double())


def test_numbers_among_the_outputs_do_not_count(images, tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return {"samples": x.shape[0], "maps": self.conv(x)}

    report = export_onnx(quantized(Counts(), images), tmp_path / "net.onnx", images)
    assert report.difference < STEPS and report.agreement > 0.9


def test_signed_activations_are_the_same_numbers(images, tmp_path):
    for target in ("tensorrt", "xnnpack"):
        module = quantized(Residual(), images, target=target)
        report = export_onnx(module, tmp_path / "signed.onnx", images)
        model = onnx.load(str(tmp_path / "signed.onnx"))
        points = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT8]
        assert not points and report.difference < STEPS


def test_errors_come_before_anything_is_written(module, images, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"mine")
    asymmetric = quantized(Residual(), images, target=None)
    cases = [
        (lambda: export_onnx(QuantizationModule(Residual()), path, images), RuntimeError, "run Calibration first"),
        (lambda: export_onnx(asymmetric, path, images, "onnxruntime"), ValueError,
         "stem has asymmetric weights, .*target='onnxruntime' .*quantize the model again"),
        (lambda: export_onnx(module, path, images, "tensorrt"), ValueError, "activations with zero points"),
        (lambda: export_onnx(module, path, images, "cpu"), ValueError, "target must be one of .* got 'cpu'"),
        (lambda: export_onnx(module, path, torch.ones(2, 5, 12, 12)), ValueError, r"does not fit.*\(2, 5, 12, 12\)"),
        (lambda: export_onnx(quantized(Residual(), images, target=None, per_token=True), path, images), ValueError,
         "ranges per token"),
    ]  # fmt: skip
    for export, error, message in cases:
        with pytest.raises(error, match=message):
            export()
    assert path.read_bytes() == b"mine" and [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_a_model_on_several_devices_is_refused(module, images, tmp_path):
    spread = copy.deepcopy(module)
    spread.model.register_buffer("elsewhere", torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match=r"several devices \(cpu, meta\): move it to one"):
        export_onnx(spread, tmp_path / "net.onnx", images)


def test_a_missing_package_is_named(module, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxruntime: pip install .*\[export\].*check=False"):
        export_onnx(module, tmp_path / "net.onnx", images)
    export_onnx(module, tmp_path / "net.onnx", images, check=False)


def test_kinds_of_quantizers_that_onnx_does_not_know_are_refused(images, tmp_path):
    import tests.test_extensions  # noqa: F401  registers the kind

    module = quantized(Residual(), images, target=None, activation_quantizer="power_of_two")
    with pytest.raises(ValueError, match="stem input has a quantizer of the kind 'power_of_two'"):
        export_onnx(module, tmp_path / "net.onnx", images)


def test_a_target_of_ones_own(images, tmp_path):
    register_target(Target("accelerator", True, weight_bits=[4], activation_bits=[8], between_bits=8))
    module = quantized(
        Residual(), images, target="accelerator", weight_bits=4, edge_bits=None, overrides={"head": None}
    )
    report = export_onnx(module, tmp_path / "net.onnx", images)
    assert report.target == "accelerator" and report.counts["QLinearConv"] == 6
    register_target(Target("integers_only", symmetric_weights=True, between_bits=8, float_layers=False))
    with pytest.raises(ValueError, match=r"Layer head would stay float .*'integers_only' runs no float layers"):
        quantized(Residual(), images, target="integers_only", overrides={"head": None})


def test_several_inputs_and_a_stage_after_the_export(images, make_trainer, loader, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(6, 8)

        def forward(self, x, y):
            return self.first(x) + self.second(y)

    batch = {"x": torch.randn(16, 4), "y": torch.randn(16, 6)}
    module = quantized(Two(), batch)
    report = export_onnx(module, tmp_path / "two.onnx", batch)
    session = make_session(tmp_path / "two.onnx")
    assert [value.name for value in session.get_inputs()] == ["x", "y"] and report.difference < STEPS
    stage = AdaQuant(iterations=5)
    make_trainer(stage).fit(module, as_loader(batch))
    assert stage.result.figures["units"] == 2


class Packs(nn.Module):
    """Lengths that are known only by their values."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        lengths = (x.abs().sum(-1) > 0).sum(-1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0][-1])


def test_what_torch_cannot_export_is_told_with_the_models_name(tmp_path):
    batch = torch.randn(4, 5, 3)
    run = quantize(Packs().eval(), [batch], pipeline="calibrate", trainer_options={"accelerator": "cpu"})
    with pytest.raises(ValueError, match=r"torch\.onnx cannot export Packs: .*lengths of packed sequences"):
        export_onnx(run.module, tmp_path / "model.onnx", batch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "limit", [lambda x: torch.maximum(x, torch.tensor(-torch.inf)), lambda x: x.clamp(-3.4e38, 3.4e38)]
)
def test_limits_beyond_all_integers_change_nothing(images, tmp_path, limit):
    report = export_onnx(quantized(Limited(limit), images), tmp_path / "net.onnx", images)
    assert report.counts == {"QLinearConv": 2} and report.difference < STEPS
