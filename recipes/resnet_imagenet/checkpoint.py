"""Weights from a local file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Of networks that were wrapped when they were saved: by DataParallel, by a LightningModule.
_PREFIXES = ("module.", "model.")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a file: the whole, or what it has under ``state_dict``; prefixes that all names share are cut.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else, or more than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give weights= the path of a checkpoint.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # Any file can be given, and there is no end to what its bytes may look like to the unpickler.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {error} A file with a state_dict was expected, as written by "
            "torch.save(model.state_dict(), path)."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} holds {_described(content)}; a state_dict (names with tensors) was expected, or a mapping with "
            "one under 'state_dict'."
        )
    return _without_prefixes(state)


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = list(state)
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state.values(), strict=True))


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with {', '.join(map(repr, list(content)[:5])) or 'nothing'}"
    return f"an object of type {type(content).__name__}"


def load_weights(net: nn.Module, path: Path, model: str, ignored: tuple[str, ...] = ()) -> None:
    """Load a checkpoint into a network.

    Args:
        net: Network of the architecture that was saved.
        path: See ``read_state_dict``.
        model: Name of the architecture, for messages.
        ignored: Beginnings of names in the file that the network has no use for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or of another network.
    """
    state = read_state_dict(path)
    try:
        net.load_state_dict({name: value for name, value in state.items() if not name.startswith(ignored)})
    except RuntimeError as error:
        raise ValueError(f"{path} is not a checkpoint of {model}; check --model. {error}") from error
