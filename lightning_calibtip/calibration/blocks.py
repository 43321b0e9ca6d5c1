"""Flat stretches of numbers, in memory or in a file, behind one interface."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

# Elements that are moved at once when a stretch has to be copied.
_PIECE = 2**22


class Block(ABC):
    """Elements of one type, at positions from 0 on.

    Args:
        dtype: Of the elements.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @abstractmethod
    def write(self, start: int, flat: Tensor) -> None:
        """Put the elements of a one-dimensional tensor of the block's type to ``start`` and after."""

    @abstractmethod
    def read(self, start: int, count: int) -> Tensor:
        """``count`` elements from ``start`` on; not to be changed."""

    @abstractmethod
    def rows(self, index: Tensor, width: int) -> Tensor:
        """Copies of the rows ``index`` of the matrix that has ``width`` columns, shape (len(index), width)."""

    @abstractmethod
    def free(self) -> None:
        """Give the space back."""

    def copy_to(self, other: "Block", count: int) -> None:
        """Write the first ``count`` elements into another block."""
        for start in range(0, count, _PIECE):
            other.write(start, self.read(start, min(_PIECE, count - start)))


class MemoryBlock(Block):
    """A tensor on the device of the activations."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype)
        self._tensor = torch.empty(elements, dtype=dtype, device=device)

    def write(self, start: int, flat: Tensor) -> None:
        """See ``Block``."""
        self._tensor[start : start + len(flat)] = flat

    def read(self, start: int, count: int) -> Tensor:
        """See ``Block``."""
        return self._tensor[start : start + count]

    def rows(self, index: Tensor, width: int) -> Tensor:
        """See ``Block``."""
        whole = len(self._tensor) // width * width
        return self._tensor[:whole].view(-1, width).index_select(0, index.to(self._tensor.device))

    def free(self) -> None:
        """See ``Block``."""
        self._tensor = self._tensor[:0].clone()


class FileBlock(Block):
    """A file that is read piece by piece.

    It is not mapped into memory: the system maps far more around what is touched (whole large pages), and all of that
    counts as resident.

    ``written`` is its length in bytes so far.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._path = path
        self.written = 0
        path.touch()

    def write(self, start: int, flat: Tensor) -> None:
        """See ``Block``."""
        with self._path.open("r+b") as file:
            file.seek(start * self.dtype.itemsize)
            file.write(_bytes(flat.cpu().contiguous()))
        self.written = max(self.written, (start + len(flat)) * self.dtype.itemsize)

    def read(self, start: int, count: int) -> Tensor:
        """See ``Block``."""
        return self._read([start], count)[0]

    def rows(self, index: Tensor, width: int) -> Tensor:
        """See ``Block``."""
        return self._read([row * width for row in index.tolist()], width)

    def free(self) -> None:
        """See ``Block``."""
        self._path.unlink(missing_ok=True)

    def _read(self, starts: list[int], count: int) -> Tensor:
        found = torch.empty(len(starts), count, dtype=self.dtype)
        with self._path.open("rb") as file:
            for row, start in zip(found, starts, strict=True):
                file.seek(start * self.dtype.itemsize)
                got = file.readinto(_bytes(row))
                if got != count * self.dtype.itemsize:
                    raise OSError(f"{self._path} was cut short: {got} bytes at element {start} instead of {count}.")
        return found


def _bytes(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data
