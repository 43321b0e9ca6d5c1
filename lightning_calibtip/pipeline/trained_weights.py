"""Which weights of a training are quantized when it ends."""

import copy
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ..files.damage import describe_error
from ..lightning_types import is_a
from ..network.checkpoint import is_quantized

BEST, LAST = "best", "last"


def check_ckpt_path(trainer: pl.Trainer, ckpt_path: str | Path | None) -> None:
    """Refuse before training what could not be found after it.

    Args:
        trainer: Trainer that is about to train.
        ckpt_path: See ``chosen_checkpoint``.

    Raises:
        MisconfigurationException: If it is neither a name nor a path, or the best weights are asked for and nothing
            says which they are.

    Example:
        >>> check_ckpt_path(pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), "last")
    """
    if ckpt_path is not None and not isinstance(ckpt_path, str | Path):
        raise MisconfigurationException(f"ckpt_path must be 'best', 'last' or a path, got {ckpt_path!r}.")
    if ckpt_path not in (None, BEST, LAST) and not Path(str(ckpt_path)).suffix and not Path(str(ckpt_path)).exists():
        # The training may still write a checkpoint, but none without a suffix.
        raise MisconfigurationException(
            f"ckpt_path must be 'best', 'last' or the path of a checkpoint, got {ckpt_path!r}."
        )
    if ckpt_path == BEST and getattr(trainer.checkpoint_callback, "monitor", None) is None:
        raise MisconfigurationException(
            'ckpt_path="best" needs a ModelCheckpoint that monitors a metric: add '
            'ModelCheckpoint(monitor="val_loss") to the Trainer\'s callbacks, or take ckpt_path="last".'
        )


def chosen_checkpoint(trainer: pl.Trainer, ckpt_path: str | Path | None) -> Path | None:
    """The checkpoint whose weights are quantized; None for the weights as they are when training ends.

    Args:
        trainer: Trainer that has trained.
        ckpt_path: ``"best"`` for what its ModelCheckpoint has found best, ``"last"`` for the weights as they are, a
            path, or None: the best where a ModelCheckpoint that monitors a metric has kept some, and no weights are
            averaged at the end.

    Raises:
        FileNotFoundError: If there is no such file.

    Example:
        >>> chosen_checkpoint(pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), None)
    """
    best = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    if ckpt_path is None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averages = any(is_a(callback, "StochasticWeightAveraging") for callback in callbacks)
        monitors = getattr(trainer.checkpoint_callback, "monitor", None) is not None
        # A ModelCheckpoint that has kept nothing is no reason to lose the run.
        ckpt_path = BEST if monitors and best.is_file() and not averages else LAST
    if ckpt_path == LAST:
        return None
    path = best if ckpt_path == BEST else Path(ckpt_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"The weights to quantize are not there: ckpt_path={str(ckpt_path)!r} means {path}, which is no file. Take "
            'ckpt_path="last", or a path.'
        )
    return path


@contextmanager
def holding_weights(module: pl.LightningModule, path: Path | None, own: bool) -> Iterator[str]:
    """Inside, a module has the weights of a checkpoint; afterwards it is as it was. Gives a description of them.

    Args:
        module: The trained module.
        path: The checkpoint; None for the weights that the module has.
        own: Whether this process has written it, so that its Python objects can be loaded.

    Raises:
        ValueError: If it is no checkpoint of the module.

    Example:
        >>> with holding_weights(pl.LightningModule(), None, own=True) as described:
        ...     described
        'as they are when training ends'
    """
    if path is None:
        yield "as they are when training ends"
        return
    kept = copy.deepcopy(module.state_dict())
    try:
        checkpoint = load_weights(module, path, trusted=own)
        yield f"{path} (epoch {checkpoint.get('epoch', '?')}, step {checkpoint.get('global_step', '?')})"
    finally:
        module.load_state_dict(kept)


def load_weights(model: pl.LightningModule, path: str | Path, trusted: bool = False) -> Mapping[str, Any]:
    """Load the weights of a Lightning checkpoint into a model.

    Args:
        model: The model.
        path: The checkpoint.
        trusted: Whether it may hold Python objects, which may run any code when they are loaded.

    Returns:
        The checkpoint.

    Raises:
        ValueError: If it is no checkpoint of this model, is quantized already, or holds more than tensors and plain
            values.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> model = pl.LightningModule()
        >>> with TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {}}, f"{folder}/trained.ckpt")
        ...     _ = load_weights(model, f"{folder}/trained.ckpt")
    """
    if is_quantized(path):
        raise ValueError(f"{path} is quantized already; give the checkpoint of the float model.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trusted)
    except (RuntimeError, EOFError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint ({describe_error(error)}).") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects besides tensors (hyperparameters?), which are not loaded: save it with "
            "save_checkpoint(path, weights_only=True)."
        ) from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path} is no Lightning checkpoint: it has no state_dict.")
    try:
        model.load_state_dict(weights, strict=model.strict_loading)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a checkpoint of {type(model).__name__}: {error}") from error
    return checkpoint
