"""Checkpoints that are written completely or not at all."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from ..files.atomic import replacing

# Bytes that are read back at once.
_PIECE = 1 << 20


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
            with unfinished.open("r+b") as file:
                written = _Hashing(file)
                torch.save(dict(checkpoint), cast(BinaryIO, written))
            read = hashlib.sha256()
            with unfinished.open("rb") as file:
                while piece := file.read(_PIECE):
                    read.update(piece)
            if read.digest() != written.hash.digest():
                raise OSError(f"{path} was not written: what was read back differs. Is the disk sound?")


class _Hashing:
    """A file that is written from beginning to end, and the digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        """See ``BinaryIO``."""
        self.hash.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        """See ``BinaryIO``."""
        self.file.flush()
