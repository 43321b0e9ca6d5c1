"""Which process something on disk belongs to."""

import os
import re
import socket
from typing import NamedTuple


class Owner(NamedTuple):
    """A process.

    Args:
        host: Name of its machine, of letters, digits, ``_`` and ``.`` only.
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
        return cls(re.sub(r"[^\w.]", "_", socket.gethostname()) or "localhost", os.getpid())

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
