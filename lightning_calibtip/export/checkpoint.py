"""The quantized part of a checkpoint: configuration and packed integer weights, as plain values and tensors."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantization.affine import dequantize, integer_range
from ..quantization.network import QuantizedNetwork
from .packing import pack_integers, unpack_integers

# Where a Lightning checkpoint has it.
CHECKPOINT_KEY = "calibtip"

_PARAMETRIZATION = "parametrizations.weight."
_LATENT = f"{_PARAMETRIZATION}original"


def pack_network(network: QuantizedNetwork, state_dict: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Move the quantized layers' weights out of a state dict into packed integers.

    Args:
        network: Prepared.
        state_dict: Changed in place: loses the layers' latent weights, and what layers share with the one that they are
            tied to.
        prefix: Of the model's names in ``state_dict``.

    Returns:
        ``{"config": ..., "weights": {layer: {"packed", "shape"}}}``, for ``torch.save`` and
        ``torch.load(weights_only=True)``.
    """
    weights = {}
    for name, layer in network.layers.items():
        quantizer = layer.weight_quantizer
        if quantizer is None:
            for key in _shared_keys(state_dict, f"{prefix}{name}"):
                del state_dict[key]
            continue
        del state_dict[f"{prefix}{name}.{_LATENT}"]
        packed = pack_integers(layer.integer_weight(), quantizer.bits, quantizer.qmin)
        weights[name] = {"packed": packed, "shape": list(layer.weight.shape)}
    return {"config": network.to_config(), "weights": weights}


def unpack_network(
    network: QuantizedNetwork, packed: dict[str, Any], state_dict: dict[str, Tensor], prefix: str
) -> None:
    """Give the network the structure of a checkpoint, and its state dict the latent weights, which are the dequantized
    integers.

    Args:
        network: Of the float model; or already with this very structure.
        packed: From ``pack_network``.
        state_dict: Changed in place, ready for ``load_state_dict``.
        prefix: Of the model's names in ``state_dict``.

    Raises:
        ValueError: If the checkpoint is of another model, another version, or damaged.
    """
    network.load_config(packed["config"])
    for name, entry in packed["weights"].items():
        quantizer = network.layers[name].weight_quantizer
        assert quantizer is not None
        bits = packed["config"]["layers"][name][0]
        qmin, _ = integer_range(bits, quantizer.symmetric)
        integers = unpack_integers(entry["packed"], tuple(entry["shape"]), bits, qmin)
        scale, zero_point = (
            state_dict[f"{prefix}{name}.parametrizations.weight.0.{key}"].to(integers.device)
            for key in ("scale", "zero_point")
        )
        state_dict[f"{prefix}{name}.{_LATENT}"] = dequantize(integers, scale, zero_point, quantizer.axis)
    for name, owner in packed["config"]["tied"].items():
        for key in _shared_keys(state_dict, f"{prefix}{owner}"):
            state_dict[key.replace(f"{prefix}{owner}", f"{prefix}{name}", 1)] = state_dict[key]


def _shared_keys(state_dict: dict[str, Tensor], layer: str) -> list[str]:
    return [key for key in state_dict if key.startswith(f"{layer}.{_PARAMETRIZATION}")]


def is_quantized(path: str | Path) -> bool:
    """Whether a file is the checkpoint of a QuantizationModule; False for what does not load."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError):
        return False
    return isinstance(checkpoint, Mapping) and CHECKPOINT_KEY in checkpoint
