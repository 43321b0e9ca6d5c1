"""Classification networks of torchvision with weights of torchvision, of a file, or random ones."""

from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from .checkpoint import load_weights
from .preprocessing import Preprocessing

# The first weights of each network, those of the paper.
DEFAULT_WEIGHTS = "IMAGENET1K_V1"
# Modules that only training has a use for, of Inception v3 and GoogLeNet.
_AUXILIARY_HEADS = ("AuxLogits", "aux1", "aux2")
_FILE_ENDINGS = (".pt", ".pth", ".th", ".tar", ".ckpt", ".bin")


def names() -> list[str]:
    """All classification networks."""
    return list_models(torchvision.models)


def load_torchvision(name: str, weights: str | None = None) -> tuple[nn.Module, Preprocessing]:
    """A network and its preprocessing: that of its weights, or for a file and random weights of torchvision's.

    The auxiliary heads of Inception v3 and GoogLeNet are removed, since they run in training only: their weights would
    count in the size of the float and of the quantized model.

    Args:
        name: One of ``names()``.
        weights: Name in the weights enum of the network, ``"DEFAULT"``, a checkpoint file, or ``"random"``; None for
            ``DEFAULT_WEIGHTS``.

    Raises:
        FileNotFoundError: If ``weights`` is named like a file and there is none.
        ValueError: If the network has no such weights, or the file is of another one.
        ConnectionError: If weights of torchvision cannot be downloaded.
    """
    weights = DEFAULT_WEIGHTS if weights is None else weights
    if weights == "random":
        return _without_auxiliary_heads(_build(name)), _usual_preprocessing(name)
    if is_file_name(weights):
        net = _without_auxiliary_heads(_build(name))
        load_weights(net, Path(weights), name, tuple(f"{head}." for head in _AUXILIARY_HEADS))
        return net, _usual_preprocessing(name)
    known = get_model_weights(name).__members__
    if weights not in known:
        raise ValueError(
            f"{name} has no weights {weights!r}: give one of {', '.join(known)}, a checkpoint file, or 'random'."
        )
    return _without_auxiliary_heads(_download(name, known[weights])), Preprocessing.of_weights(known[weights])


def is_file_name(weights: str) -> bool:
    """Whether weights are meant to be a file, be there one or not."""
    return Path(weights).is_file() or "/" in weights or weights.endswith(_FILE_ENDINGS)


def _build(name: str) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("inception_v3", "googlenet"):
        # As torchvision builds them for its weights; files are mostly those.
        options = {"transform_input": True, "init_weights": False}
    return get_model(name, weights=None, **options)


def _download(name: str, weights: Any) -> nn.Module:
    try:
        return get_model(name, weights=weights)
    # Of urllib; a RuntimeError where the file is not what was expected.
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"The weights {weights.name} of {name} cannot be downloaded from {weights.url}: {error}. Download the file "
            "elsewhere and give its path as weights, or use weights=random to try things out."
        ) from error


def _usual_preprocessing(name: str) -> Preprocessing:
    members = get_model_weights(name).__members__
    return Preprocessing.of_weights(members.get(DEFAULT_WEIGHTS, members["DEFAULT"]))


def _without_auxiliary_heads(net: nn.Module) -> nn.Module:
    if isinstance(net, torchvision.models.Inception3 | torchvision.models.GoogLeNet):
        for head in _AUXILIARY_HEADS:
            if hasattr(net, head):
                setattr(net, head, None)
        net.aux_logits = False
    return net
