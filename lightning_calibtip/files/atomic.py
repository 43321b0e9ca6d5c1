"""Files that are written completely or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .owner import Owner

# What is still being written is called ".<name>.<host>-<process>.<random><this>".
_SUFFIX = ".unfinished"


def write_atomically(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that, whenever the process or the machine stops, it has its old content or all of the new one.

    Args:
        path: File to write; its folder is made if it does not exist. A link is replaced, what it points to stays.
        content: New content, or a function that writes it to an open file.

    Raises:
        OSError: If it cannot be written (no room, no permission, a folder of that name); the file is as it was then.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_atomically(f"{folder}/new/note.txt", b"done")
        ...     Path(folder, "new", "note.txt").read_bytes()
        b'done'
    """
    with replacing(path) as unfinished, unfinished.open("r+b") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a new, empty file beside ``path``, for this process alone, which takes its place at the end.

    What killed processes of this machine have left of earlier attempts at the same file is removed. Where the body
    raises, ``path`` stays as it was.

    Args:
        path: File to write; its folder is made if it does not exist.

    Raises:
        OSError: See ``write_atomically``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/note.txt") as unfinished:
        ...         _ = unfinished.write_text("done")
        ...     [file.name for file in Path(folder).iterdir()]
        ['note.txt']
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file.")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a device or a pipe, which cannot be replaced: give the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent, path.name)
    unfinished = path.with_name(f"{_start(path.name)}{Owner.this()}.{secrets.token_hex(8)}{_SUFFIX}")
    # Exclusively: a link that lies there already is not followed.
    unfinished.open("xb").close()
    try:
        yield unfinished
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        if path.is_file() and not path.is_symlink():
            shutil.copymode(path, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync(path.parent)


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what processes of this machine that do not run any longer have left half written.

    Args:
        folder: Folder to look into, not into folders inside.
        name: Name of the file that was being written; None for all.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, f".a.csv.{Owner.this()}.0123456789abcdef.unfinished").touch()
        ...     remove_unfinished(Path(folder))
        ...     len(list(Path(folder).iterdir()))
        1
    """
    start = "." if name is None else _start(name)
    for path in folder.iterdir():
        if path.name.startswith(start) and path.name.endswith(_SUFFIX):
            # Names and hosts may have dots, the random part has none.
            before, _, pid = path.name.removesuffix(_SUFFIX).rpartition(".")[0].rpartition("-")
            host = Owner.this().host
            if before.endswith(f".{host}") and pid.isdigit() and Owner(host, int(pid)).is_gone():
                path.unlink(missing_ok=True)


def _start(name: str) -> str:
    """How names of unfinished files begin; the whole name may have 255 bytes."""
    return f".{name.encode()[:80].decode(errors='ignore')}."


def _sync(folder: Path) -> None:
    """Make the names in a folder last, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
