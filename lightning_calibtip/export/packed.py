"""Packed files: a quantized module in as many bytes as its bit-widths say, and back."""

import base64
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import needs_extra
from ..files.atomic import write_atomically
from ..module import QuantizationModule
from ..network.checkpoint import digest_of, pack_network, unpack_network
from ..network.folding import FoldedBatchNorm
from ..network.scheme import QuantizationScheme
from ..quantization.quantizers import Quantizer
from ..user_model import require_quantized_module

PACKED_VERSION = 1

# Key of the file's metadata, and names of its two tensors: integers of weights, and everything else.
_KEY, _INTEGERS, _VALUES = "calibtip", "integers", "values"
_PREFIX = "model."


def export_packed(module: QuantizationModule, path: str | Path) -> Path:
    """Write a calibrated module as one safetensors file, in which weights take as many bits as they have.

    The plan, the index of the tensors and a digest over everything are the file's metadata, compressed. What only
    re-tuning needs (statistics of folded BatchNorms) is left out: to go on with a module, save a checkpoint.

    Args:
        module: Calibrated module.
        path: File to write; a file of that name is replaced, completely or not at all.

    Returns:
        The path.

    Raises:
        RuntimeError: If the module is not calibrated.
        ModuleNotFoundError: If safetensors is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_calibtip import quantize
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = torch.randn(8, 4)
        >>> run = quantize(net, [batch], pipeline="calibrate", weight_bits=4, trainer_options={"accelerator": "cpu"})
        >>> with TemporaryDirectory() as folder:
        ...     loaded = load_packed(export_packed(run.module, f"{folder}/model.safetensors"), net)
        >>> torch.equal(loaded(batch), run.module(batch))
        True
    """
    _require_safetensors()
    from safetensors.torch import save

    require_quantized_module(module, "export_packed")
    if not module.network.calibrated:
        raise RuntimeError("The module has no ranges yet, so nothing can be packed: run Calibration first.")
    state = {f"{_PREFIX}{name}": tensor.detach().cpu() for name, tensor in module.model.state_dict().items()}
    packed = pack_network(module.network, state, _PREFIX)
    left_out = _left_out(module.model)
    state = {name: tensor.cpu() for name, tensor in state.items() if name not in left_out}
    config = json.loads(json.dumps(packed["config"]))
    integers = {name: entry["packed"] for name, entry in packed["weights"].items()}
    index = {
        "version": PACKED_VERSION,
        "config": config,
        "weights": [[name, entry["shape"], len(entry["packed"])] for name, entry in packed["weights"].items()],
        "state": [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in state.items()
        ],
        "digest": digest_of(config, packed["weights"], state, _PREFIX),
    }
    compressed = base64.b85encode(zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)).decode()
    content = save(
        {_INTEGERS: _joined(integers.values()), _VALUES: _joined(_bytes_of(tensor) for tensor in state.values())},
        metadata={_KEY: compressed},
    )
    write_atomically(path, content)
    return Path(path)


def load_packed(path: str | Path, model: nn.Module, validation_step: Any = None) -> QuantizationModule:
    """Load a file of ``export_packed``; the module computes the same, bit for bit.

    Args:
        path: The file.
        model: The float model, trained or not, as it was given to the ``QuantizationModule`` that was written.
        validation_step: See ``QuantizationModule``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of ``export_packed``, is damaged or was changed, or is of another model.
        ModuleNotFoundError: If safetensors is missing.

    Example:
        See ``export_packed``.
    """
    index, integers, values = _read(Path(path))
    try:
        weights, state = _unpacked(index, integers, values)
        config, digest = index["config"], index["digest"]
        scheme = QuantizationScheme(**config["scheme"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged or was changed ({type(error).__name__}: {error}): take another copy, or write it anew."
        ) from error
    module = QuantizationModule(model, scheme, validation_step=validation_step)
    unpack_network(module.network, {"config": config, "weights": weights, "digest": digest}, state, _PREFIX)
    present = {f"{_PREFIX}{name}": tensor for name, tensor in module.model.state_dict().items()}
    left_out = _left_out(module.model)
    state |= {name: tensor for name, tensor in present.items() if name in left_out and name not in state}
    try:
        module.model.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} is of another model than {type(model).__name__}: {error}") from error
    return module


def _require_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{needs_extra('A packed file', error.name, 'export')}.") from error


def _unpacked(index: dict[str, Any], integers: Tensor, values: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Weights as a checkpoint has them, and everything else of the state dict."""
    weights: dict[str, Any] = {}
    for name, shape, length in index["weights"]:
        weights[name], integers = {"packed": integers[:length], "shape": shape}, integers[length:]
    state: dict[str, Tensor] = {}
    for name, kind, shape in index["state"]:
        dtype = getattr(torch, kind)
        length = math.prod(shape) * dtype.itemsize
        state[name], values = values[:length].clone().view(dtype).view(shape), values[length:]
    return weights, state


def _read(path: Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Index, integers of all weights, and bytes of everything else."""
    _require_safetensors()
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if _KEY not in metadata:
                raise ValueError(f"{path} was not written by export_packed: it holds no quantization plan.")
            index = json.loads(zlib.decompress(base64.b85decode(metadata[_KEY])))
            integers, values = file.get_tensor(_INTEGERS), file.get_tensor(_VALUES)
    except (SafetensorError, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged or not complete ({error}): take another copy, or write it anew."
        ) from error
    if index["version"] != PACKED_VERSION:
        raise ValueError(
            f"{path} has version {index['version']!r}, this release reads version {PACKED_VERSION}: load it with the "
            "release that wrote it."
        )
    return index, integers, values


def _left_out(model: nn.Module) -> set[str]:
    """Names of what is not stored: statistics of folded BatchNorms, zero points that are known."""
    names = set()
    # Layers that read one tensor share its quantizer.
    for name, module in model.named_modules(remove_duplicate=False):
        place = f"{_PREFIX}{name}."
        if isinstance(module, FoldedBatchNorm):
            names |= {f"{place}{buffer}" for buffer, _ in module.named_buffers(recurse=False)}
        elif isinstance(module, Quantizer):
            names |= {f"{place}{parameter}" for parameter, _ in module.named_parameters()}
            names -= {f"{place}{parameter}" for parameter in module.stored()}
    return names


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _joined(parts: Any) -> Tensor:
    found = [part for part in parts if part.numel()]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.uint8)
