"""Which process something on disk belongs to."""

import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Owner(NamedTuple):
    """A process.

    Args:
        host: Name of its machine (and number of its container), of letters, digits, ``_`` and ``.`` only.
        pid: Its number there.

    Example:
        >>> me = Owner.this()
        >>> me.is_gone(), Owner.parse(str(me)) == me
        (False, True)
    """

    host: str
    pid: int

    @classmethod
    def this(cls) -> "Owner":
        """This process."""
        host = re.sub(r"[^\w.]", "_", socket.gethostname()) or "localhost"
        # Containers may have one host name, and numbers of processes of their own.
        with suppress(OSError):
            host = f"{host}.{Path('/proc/self/ns/pid').stat().st_ino}"
        return cls(host, os.getpid())

    @classmethod
    def parse(cls, text: str) -> "Owner | None":
        """Inverse of ``str``; None for any other text."""
        match = re.fullmatch(r"([\w.]+)-(\d+)", text)
        return None if match is None else cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}"

    def is_gone(self) -> bool:
        """Whether it is certain that the process does not run any longer: it ran on this machine."""
        # On Windows there is no harmless signal.
        if os.name != "posix" or self.host != Owner.this().host:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return False
