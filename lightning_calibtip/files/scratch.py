"""Scratch folders, which end with the process that made them, whatever ends it."""

import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .owner import Owner

_PREFIX = "calibtip-activations-"
_LOCK = "in_use.lock"

# A folder that is younger than this many seconds may be about to be locked by an owner on another machine.
_YOUNG = 60.0


class Scratch:
    """A new scratch folder, in use until it is closed or this process ends; folders that killed processes have left
    beside it are removed.

    Args:
        parent: Folder to make it in, itself made if it does not exist; the system's temporary folder if None.

    Attributes:
        path: The folder, which has the names of machine and process in its own.

    Raises:
        OSError: If it cannot be made.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     scratch = Scratch(folder)
        ...     path = scratch.path
        ...     scratch.close()
        ...     path.parent == Path(folder), path.exists()
        (True, False)
    """

    def __init__(self, parent: str | Path | None = None) -> None:
        folder = Path(tempfile.gettempdir() if parent is None else parent)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_orphans(folder)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{Owner.this()}-", dir=folder))
        lock = FileLock(self.path / _LOCK, timeout=0)
        lock.acquire()
        self._close = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        """Remove the folder and what is in it."""
        self._close()


def _is_mine(path: Path) -> bool:
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()


def _remove(path: Path, lock: FileLock, owner: int | None = None) -> None:
    if owner not in (None, os.getpid()):
        # A process that was forked off ends before the one that uses the folder.
        return
    lock.release()
    shutil.rmtree(path, ignore_errors=True)


def _remove_orphans(folder: Path) -> None:
    """Remove scratch folders whose owners have ended, or whose lock nobody holds any longer."""
    for path in folder.glob(f"{_PREFIX}*"):
        # Another user's are none of ours, nor is what a link points to.
        with suppress(OSError):
            if path.is_symlink() or not path.is_dir() or not _is_mine(path):
                continue
            owner = Owner.parse(path.name.removeprefix(_PREFIX).rpartition("-")[0])
            is_gone = owner is not None and owner.is_gone()
            if not (path / _LOCK).exists() and time.time() - path.stat().st_mtime < _YOUNG and not is_gone:
                continue
            lock = FileLock(path / _LOCK, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            _remove(path, lock)
