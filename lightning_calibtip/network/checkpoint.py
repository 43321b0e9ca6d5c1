"""The quantized part of a checkpoint: the plan, packed integer weights and a digest, as plain values and tensors."""

import hashlib
import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.damage import describe_error
from ..quantization.packing import pack_integers, unpack_integers
from ..quantization.ranges import RangeOptions
from .hooks import INPUT_QUANTIZERS
from .layers import QuantizedLayer
from .network import QuantizedNetwork
from .quantization_plan import QuantizationPlan
from .scheme import QuantizationScheme
from .version2 import read_version_2, rename_version_2

log = logging.getLogger(__name__)

# Where a Lightning checkpoint has it.
CHECKPOINT_KEY = "calibtip"

CONFIG_VERSION = 3


def pack_network(network: QuantizedNetwork, state_dict: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Move the quantized layers' weights out of a state dict into packed integers.

    What is stored is the quantized model, also where the float one is being shown at the moment.

    Args:
        network: The network, whatever has been done to it so far.
        state_dict: Changed in place: it loses the layers' latent weights, and all but one copy of what layers share
            (tied weights, quantizers of a tensor that several layers read).
        prefix: Prefix of the model's names in ``state_dict``.

    Returns:
        ``{"config": ..., "weights": {layer: {"packed", "shape"}}, "digest": ...}``, for ``torch.save`` and
        ``torch.load(weights_only=True)``.

    Example:
        See ``unpack_network``.
    """
    weights: dict[str, Any] = {}
    for name, layer in network.layers.items():
        place = f"{prefix}{name}."
        weight, bias = layer.latent()
        if bias is not None:
            state_dict[f"{place}bias"] = bias
        # A class with its own way to write its state has written the rounded weight, too.
        state_dict.pop(f"{place}{layer.type.weight}", None)
        if not layer.has_weight:
            for key in _keys_below(state_dict, _weight_place(layer, prefix)):
                del state_dict[key]
        elif layer.weight_quantizer is None or not network.calibrated:
            state_dict[f"{_weight_place(layer, prefix)}original"] = weight
        else:
            del state_dict[f"{_weight_place(layer, prefix)}original"]
            spec = layer.weight_quantizer.spec
            packed = pack_integers(layer.weight_quantizer.encode(weight), spec.bits, spec.qmin)
            weights[name] = {"packed": packed, "shape": list(weight.shape)}
    for place, _ in _shared_quantizers(network, prefix):
        for key in _keys_below(state_dict, place):
            del state_dict[key]
    config = {
        "version": CONFIG_VERSION,
        "plan": network.plan.to_dict() if network.prepared else None,
        "scheme": network.scheme.to_dict(),
        "calibrated": network.calibrated,
        "ranges": next((asdict(layer.range_options) for layer in network.layers.values()), {}),
        "fingerprint": network.fingerprint,
    }
    return {"config": config, "weights": weights, "digest": digest_of(config, weights, state_dict, prefix)}


def unpack_network(
    network: QuantizedNetwork, packed: dict[str, Any], state_dict: dict[str, Tensor], prefix: str
) -> None:
    """Give the network the structure of a checkpoint, and its state dict the latent weights, which are the dequantized
    integers.

    Args:
        network: Made from the float model; or already quantized with the same structure, in whatever formats (not for
            checkpoints of version 2, in which layers that read one tensor have a quantizer each).
        packed: From ``pack_network``, of this version or of version 2.
        state_dict: Changed in place, ready for ``load_state_dict``.
        prefix: Prefix of the model's names in ``state_dict``.

    Raises:
        ValueError: If the checkpoint is of another model, of another version, or damaged.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> network = QuantizedNetwork(model.eval(), QuantizationScheme(weight_bits=4))
        >>> network.prepare(lambda: model(torch.ones(1, 2)))
        >>> state = model.state_dict()
        >>> packed = pack_network(network, state, "")
        >>> other = nn.Sequential(nn.Linear(2, 2)).eval()
        >>> unpack_network(QuantizedNetwork(other, QuantizationScheme()), packed, state, "")
        >>> other.load_state_dict(state)
        <All keys matched successfully>
    """
    plan, scheme = _read_config(network, packed, state_dict, prefix)
    config = packed["config"]
    if plan is None and network.prepared:
        raise ValueError(
            "The checkpoint was saved before calibration and this model is already quantized; load the checkpoint "
            "into a QuantizationModule made anew from the float model."
        )
    if plan is not None:
        if not network.prepared:
            network.apply(plan)
        else:
            network.adopt(plan)
    network.scheme = scheme
    network.has_float_weights = config["fingerprint"] == network.fingerprint
    network.set_calibrated(config["calibrated"])
    ranges = _range_options(config.get("ranges", {}))
    for layer in network.layers.values():
        layer.range_options = ranges
    _check_values(network, state_dict, prefix)
    for name, entry in packed["weights"].items():
        layer = network.layers[name]
        place = _weight_place(layer, prefix)
        state_dict[f"{place}original"] = _dequantized(layer, entry, state_dict, f"{place}0.")
    for layer in network.layers.values():
        if layer.tied_to is not None:
            _copy_below(state_dict, _weight_place(layer.tied_to, prefix), _weight_place(layer, prefix))
    for place, first in _shared_quantizers(network, prefix):
        _copy_below(state_dict, first, place)


def _range_options(found: Mapping[str, Any]) -> RangeOptions:
    """How ranges were chosen, for those that are chosen later; the defaults where nobody has registered it here."""
    try:
        return RangeOptions(**found)
    except (TypeError, ValueError) as error:
        log.warning("Ranges that are chosen from now on are chosen by the defaults: %s", error)
        return RangeOptions()


def _read_config(
    network: QuantizedNetwork, packed: dict[str, Any], state_dict: dict[str, Tensor], prefix: str
) -> tuple[QuantizationPlan | None, QuantizationScheme]:
    """Plan (None of a model that was saved before calibration) and scheme of a checkpoint."""
    config = packed["config"]
    version = config.get("version")
    if version == 2:
        rename_version_2(state_dict, prefix, config["layers"])
        old_plan, scheme = read_version_2(network.model, config)
        return (old_plan if config["layers"] else None), scheme
    if version != CONFIG_VERSION:
        raise ValueError(
            f"The checkpoint's quantization config has version {version!r}, this release reads versions 2 and "
            f"{CONFIG_VERSION}; load it with the release that wrote it."
        )
    if not is_intact(packed, state_dict, prefix):
        raise ValueError(
            "The checkpoint is damaged or was changed: its digest does not fit its plan, weights and scales. Write it "
            "anew from the quantized model, or take another copy of it."
        )
    plan = None if config["plan"] is None else QuantizationPlan.from_dict(config["plan"])
    return plan, QuantizationScheme(**config["scheme"])


def _dequantized(
    layer: QuantizedLayer, entry: Mapping[str, Any], state_dict: Mapping[str, Tensor], place: str
) -> Tensor:
    """Latent weight of a layer from its integers and from the parameters of its quantizer below ``place``."""
    quantizer = layer.weight_quantizer
    if quantizer is None:
        raise ValueError(f"The checkpoint is damaged: it holds integers for {layer.name}, which its plan has in float.")
    shape = tuple(entry["shape"])
    if shape != tuple(layer.weight.shape):
        raise ValueError(
            f"The checkpoint is of another model: its weight of {layer.name} has the shape {shape}, this one's "
            f"{tuple(layer.weight.shape)}."
        )
    # A packed file leaves out what every such quantizer has.
    known = quantizer.state_dict()
    quantizer.load_state_dict({name: state_dict.get(f"{place}{name}", value) for name, value in known.items()})
    integers = unpack_integers(entry["packed"], shape, quantizer.spec.bits, quantizer.spec.qmin)
    return quantizer.decode(integers.to(layer.device)).detach()


def _check_values(network: QuantizedNetwork, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse scales, zero points and ratios that no quantizer can have."""
    for name, layer in network.layers.items():
        for quantizer in layer.quantizers if network.calibrated else ():
            own = next(key for key, module in layer.module.named_modules() if module is quantizer)
            for key in quantizer.state_dict():
                value, limits = state_dict.get(f"{prefix}{name}.{own}.{key}"), quantizer.limits(key)
                if value is None or limits is None:
                    continue
                low, high = limits
                if not bool(((value >= low) & (value <= high)).all()):
                    raise ValueError(
                        f"The checkpoint is damaged: the {key} of {quantizer.name} must be from {low:.4g} to "
                        f"{high:.4g}, got {float(value.min()):.4g} to {float(value.max()):.4g}. Take another copy."
                    )


def _weight_place(layer: QuantizedLayer, prefix: str) -> str:
    return f"{prefix}{layer.name}.parametrizations.{layer.type.weight}."


def _shared_quantizers(network: QuantizedNetwork, prefix: str) -> Iterator[tuple[str, str]]:
    """Places of the quantizers that an earlier layer has too, each with the place there."""
    first: dict[int, str] = {}
    for name, layer in network.layers.items():
        for position, quantizer in enumerate(layer.input_quantizers):
            if quantizer is not None:
                place = f"{prefix}{name}.{INPUT_QUANTIZERS}.{position}."
                if first.setdefault(id(quantizer), place) != place:
                    yield place, first[id(quantizer)]


def _keys_below(state_dict: Mapping[str, Tensor], place: str) -> list[str]:
    return [key for key in state_dict if key.startswith(place)]


def _copy_below(state_dict: dict[str, Tensor], source: str, place: str) -> None:
    for key in _keys_below(state_dict, source):
        state_dict[f"{place}{key.removeprefix(source)}"] = state_dict[key]


def digest_of(
    config: Mapping[str, Any], weights: Mapping[str, Any], state_dict: Mapping[str, Tensor], prefix: str
) -> str:
    """SHA-256 over the configuration, the integers, and everything of the model in the state dict.

    Example:
        >>> digest_of({}, {}, {}, "")[:8]
        '44136fa3'
    """
    digest = hashlib.sha256(repr(config).encode())
    tensors = {f"packed {name}": entry["packed"] for name, entry in weights.items()}
    tensors |= {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if isinstance(tensor, Tensor) and tensor.numel():
            flat = tensor.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_intact(packed: Mapping[str, Any], state_dict: Mapping[str, Tensor], prefix: str = "model.") -> bool:
    """Whether what ``pack_network`` has made, and the state dict, still fit its digest.

    Example:
        >>> is_intact({"config": {}, "weights": {}, "digest": "0"}, {})
        False
    """
    return bool(packed.get("digest") == digest_of(packed["config"], packed["weights"], state_dict, prefix))


def require_readable(path: Any, cause: Exception | None) -> None:
    """Raise ``ValueError`` if a file cannot be read as tensors and plain values.

    Args:
        path: The file; anything else than a path to a file of this machine is left alone.
        cause: What went wrong when it was loaded, if it was.

    Raises:
        ValueError: If it cannot be read; the message names the file.

    Example:
        >>> require_readable("https://elsewhere/model.ckpt", ValueError())
    """
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        packed = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, Mapping) else None
        # Lightning passes hyperparameters on before the digest is looked at.
        if packed and packed["config"]["version"] == CONFIG_VERSION and not is_intact(packed, checkpoint["state_dict"]):
            raise ValueError("its digest does not fit its plan, weights and scales")
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "nsupported global" in str(error):
            raise ValueError(
                f"{path} holds Python objects besides tensors, which could run any code: pass weights_only=False if "
                "you trust whoever wrote it."
            ) from cause
        raise ValueError(
            f"{path} is damaged, or no checkpoint ({describe_error(error)}): take another copy, or write it anew."
        ) from cause


NOT_OURS = "{path} was not saved by a QuantizationModule; load it into your own LightningModule first and wrap that."


def require_own(path: Any) -> None:
    """Raise ``ValueError`` if a file is read well, but is no checkpoint of a QuantizationModule.

    Args:
        path: The file; anything else than a path to a file of this machine is left alone.

    Raises:
        ValueError: If it is none, or cannot be read.

    Example:
        >>> require_own("https://elsewhere/model.ckpt")
    """
    if isinstance(path, str | Path) and Path(path).is_file() and not is_quantized(path):
        require_readable(path, None)
        raise ValueError(NOT_OURS.format(path=path))


def is_quantized(path: str | Path) -> bool:
    """Whether a file is the checkpoint of a QuantizationModule; False for what does not load.

    Example:
        >>> is_quantized("no_such_file.ckpt")
        False
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, pickle.UnpicklingError):
        return False
    return isinstance(checkpoint, Mapping) and CHECKPOINT_KEY in checkpoint
