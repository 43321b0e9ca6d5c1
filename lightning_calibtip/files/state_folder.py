"""Folders for what an unfinished run keeps, so that the same run can go on: each for one process at a time."""

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .. import ranks
from .atomic import remove_unfinished, write_atomically
from .owner import Owner

log = logging.getLogger(__name__)

# Says that a folder is ours, and who works in it.
MARKER = "calibtip_state.json"
_LOCK = "calibtip_state.lock"

# Folders that a process holds, with their locks, and how often.
_held: dict[tuple[int, Path], tuple[FileLock, int]] = {}
_registry = threading.Lock()


@contextmanager
def holding(folder: str | Path | None) -> Iterator[None]:
    """Inside, the folder belongs to this process; within one process it can be held several times over.

    The lock is the system's: it ends with the process that holds it, so that a killed run leaves none behind.

    Args:
        folder: Folder of unfinished runs, made if it does not exist; None holds nothing.

    Raises:
        ValueError: If it holds something else than the state of a run.
        RuntimeError: If another process is at work in it; the message names that one.
        NotADirectoryError: If it is a file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, holding(f"{folder}/state"):
        ...     sorted(path.name for path in Path(folder, "state").iterdir())
        ['calibtip_state.json', 'calibtip_state.lock']
    """
    if folder is None or ranks.rank() > 0:
        # Rank 0 holds it for all.
        yield
        return
    place = Path(folder).resolve()
    # A process that was forked off holds nothing.
    key = (os.getpid(), place)
    with _registry:
        lock, count = _held[key] if key in _held else (_take(place, Path(folder)), 0)
        _held[key] = (lock, count + 1)
    try:
        yield
    finally:
        with _registry:
            lock, count = _held.pop(key)
            if count > 1:
                _held[key] = (lock, count - 1)
            else:
                lock.release()


def _take(place: Path, named: Path) -> FileLock:
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"The state folder {named} is a file: give a folder of its own.")
    _require_ours(place, named)
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"The state folder {named} is in use by {_describe_user(place)}: wait for that run to end, or give this "
            "one a folder of its own."
        ) from None
    try:
        remove_unfinished(place)
        owner = Owner.this()
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        described = {"content": "state of an unfinished run", "host": owner.host, "pid": owner.pid, "since": since}
        write_atomically(place / MARKER, json.dumps(described, indent=2).encode())
    except BaseException:
        lock.release()
        raise
    return lock


def _require_ours(place: Path, named: Path) -> None:
    """Refuse a folder that is not empty and has no marker."""
    if not place.exists() or (place / MARKER).exists():
        return
    # A run that was killed before it could write its marker has left these.
    foreign = sorted(
        path.name for path in place.iterdir() if path.name != _LOCK and not path.name.startswith(f".{MARKER}.")
    )
    if foreign:
        raise ValueError(
            f"The state folder {named} holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}, and no "
            "state of a run of this release: give a folder of its own, which need not exist."
        )


def _describe_user(place: Path) -> str:
    try:
        described = json.loads((place / MARKER).read_text())
        return f"process {described['pid']} on {described['host']} since {described['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def remove_state(folder: str | Path | None, patterns: Sequence[str]) -> None:
    """Remove files of a finished run from its state folder, and the folder if nothing else is in it.

    Only what ``patterns`` match is removed, and only where the folder has been held before; while another process is at
    work in it, nothing is.

    Args:
        folder: The folder, which need not exist; None does nothing.
        patterns: Names of files, with wildcards.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as parent:
        ...     with holding(f"{parent}/state"):
        ...         Path(parent, "state", "0001.pt").touch()
        ...     remove_state(f"{parent}/state", ["*.pt"])
        ...     list(Path(parent).iterdir())
        []
    """
    place = None if folder is None else Path(folder)
    if place is None or ranks.rank() > 0 or not (place / MARKER).is_file():
        return
    try:
        with holding(place):
            for path in {path for pattern in patterns for path in place.glob(pattern)}:
                if path.is_file() or path.is_symlink():
                    path.unlink(missing_ok=True)
            if {path.name for path in place.iterdir()} <= {MARKER, _LOCK}:
                (place / MARKER).unlink(missing_ok=True)
                # Windows removes no open file.
                with suppress(OSError):
                    (place / _LOCK).unlink(missing_ok=True)
    except RuntimeError as error:
        log.warning("The state in %s stays: %s", place, error)
        return
    if not (place / MARKER).exists():
        with suppress(OSError):
            if os.name == "nt":
                (place / _LOCK).unlink(missing_ok=True)
            place.rmdir()
