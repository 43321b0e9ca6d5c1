"""Checkpoints that are written completely or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from ..files.atomic import replacing
from ..network.checkpoint import CHECKPOINT_KEY, is_intact


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the file that it replaces, and reads it back before it does.

    Lightning's own goes through the system's temporary folder: from another file system it is copied into its place, so
    that a full disk or a kill leaves half a file there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, f"{folder}/model.ckpt")
        ...     AtomicCheckpointIO().load_checkpoint(f"{folder}/model.ckpt")
        {'state_dict': {}}
    """

    @override
    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None) -> None:
        """See ``CheckpointIO``; what has a URL is left to Lightning.

        Raises:
            OSError: If the file cannot be written, or reads differently.
        """
        if "://" in str(path):
            super().save_checkpoint(dict(checkpoint), path, storage_options)
            return
        with replacing(Path(path)) as unfinished:
            torch.save(dict(checkpoint), unfinished)
            # This process has just written it: hyperparameters of a subclass may be objects.
            read = torch.load(unfinished, map_location="cpu", weights_only=False)
            if CHECKPOINT_KEY in read and not is_intact(read[CHECKPOINT_KEY], read["state_dict"]):
                raise OSError(f"{path} was not written: what was read back differs. Is the disk sound?")
