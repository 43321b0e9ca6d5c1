"""Buffers: flat arrays of numbers, in memory or in a file, behind one interface."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

# Elements that are moved at once when a buffer has to be copied.
_PIECE = 2**22


class Buffer(ABC):
    """Elements of one type at positions from 0 on.

    Args:
        dtype: Type of the elements.

    Example:
        See ``MemoryBuffer``.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @abstractmethod
    def write(self, start: int, flat: Tensor) -> None:
        """Write the elements of a one-dimensional tensor of the buffer's type to position ``start`` and after."""

    @abstractmethod
    def read(self, start: int, count: int) -> Tensor:
        """Return ``count`` elements from ``start`` on, which must not be changed."""

    @abstractmethod
    def rows(self, index: Tensor, columns: int) -> Tensor:
        """Return copies of the rows ``index`` of the matrix with so many columns, shape (len(index), columns)."""

    @abstractmethod
    def free(self) -> None:
        """Give the space back."""

    def copy_to(self, other: "Buffer", count: int) -> None:
        """Write the first ``count`` elements into another buffer."""
        for start in range(0, count, _PIECE):
            other.write(start, self.read(start, min(_PIECE, count - start)))


class MemoryBuffer(Buffer):
    """Buffer in memory, on the device of the activations.

    Args:
        elements: Number of elements.
        dtype: Type of the elements.
        device: Device on which they are kept.

    Example:
        >>> buffer = MemoryBuffer(4, torch.float32, torch.device("cpu"))
        >>> buffer.write(0, torch.arange(4.0))
        >>> buffer.rows(torch.tensor([1]), columns=2)
        tensor([[2., 3.]])
    """

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype)
        self._tensor = torch.empty(elements, dtype=dtype, device=device)

    def write(self, start: int, flat: Tensor) -> None:
        """See ``Buffer``."""
        self._tensor[start : start + len(flat)] = flat

    def read(self, start: int, count: int) -> Tensor:
        """See ``Buffer``."""
        return self._tensor[start : start + count]

    def rows(self, index: Tensor, columns: int) -> Tensor:
        """See ``Buffer``."""
        whole = len(self._tensor) // columns * columns
        return self._tensor[:whole].view(-1, columns).index_select(0, index.to(self._tensor.device))

    def free(self) -> None:
        """See ``Buffer``."""
        self._tensor = self._tensor[:0].clone()


class FileBuffer(Buffer):
    """Buffer in a file that is read piece by piece.

    The file is not mapped into memory: the system maps far more around what is touched (whole large pages), and all of
    that counts as resident.

    Args:
        path: File, which is made.
        dtype: Type of the elements.

    Attributes:
        written: Length of the file in bytes so far.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     buffer = FileBuffer(Path(folder, "activations.bin"), torch.float32)
        ...     buffer.write(0, torch.arange(4.0))
        ...     buffer.read(2, 2)
        tensor([2., 3.])
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._path = path
        self.written = 0
        path.touch()

    def write(self, start: int, flat: Tensor) -> None:
        """See ``Buffer``."""
        with self._path.open("r+b") as file:
            file.seek(start * self.dtype.itemsize)
            file.write(_bytes(flat.cpu().contiguous()))
        self.written = max(self.written, (start + len(flat)) * self.dtype.itemsize)

    def read(self, start: int, count: int) -> Tensor:
        """See ``Buffer``."""
        return self._read([start], count)[0]

    def rows(self, index: Tensor, columns: int) -> Tensor:
        """See ``Buffer``."""
        return self._read([row * columns for row in index.tolist()], columns)

    def free(self) -> None:
        """See ``Buffer``."""
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
