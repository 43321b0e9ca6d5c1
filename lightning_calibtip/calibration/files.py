"""Files that are written completely or not at all."""

import os
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that, whenever the process or the machine stops, it has its old content or all of the new one.

    Args:
        path: File to write; its folder is made if it does not exist.
        content: New content.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_atomically(f"{folder}/new/note.txt", b"done")
        ...     Path(folder, "new", "note.txt").read_bytes()
        b'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
