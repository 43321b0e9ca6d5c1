"""Captured activations under a byte budget: in memory while they fit, beyond that in files."""

import math
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..files.scratch import Scratch
from .placeholders import holds_placeholder, zeros
from .storage import Buffer, FileBuffer, MemoryBuffer

_UNITS = {
    "": 1,
    "K": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}

# The rest of the budget is left to what is on its way: batches that are being captured, drawn and optimised on.
_SHARE_KEPT = 0.85

# A file of this share of the free space, or more, is refused: a full disk would hurt more than this run.
_MOST_OF_FREE_SPACE = 0.95


def parse_bytes(value: int | str | None, what: str) -> int | None:
    """Number of bytes that ``value`` stands for; None stays None.

    Args:
        value: Number of bytes, or a string such as ``"2GB"``, ``"1.5 GiB"`` or ``"500MB"``.
        what: Name of the value, for the message.

    Raises:
        ValueError: If it is not positive or cannot be read.

    Example:
        >>> parse_bytes("2GB", "activation_budget"), parse_bytes("1.5 KiB", "activation_budget")
        (2000000000, 1536)
    """
    if value is None:
        return None
    size = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]I?)?B?\s*", value.upper())):
        size = float(match[1]) * _UNITS[match[2] or ""]
    if not 1 <= size < math.inf:
        raise ValueError(f'{what} must be a positive number of bytes or a string such as "2GB", got {value!r}.')
    return int(size)


def parse_precision(value: str, what: str) -> torch.dtype | None:
    """Type in which float32 activations are kept; None for their own.

    Args:
        value: ``"float32"`` or ``"bfloat16"``.
        what: Name of the value, for the message.

    Raises:
        ValueError: If ``value`` is neither.

    Example:
        >>> parse_precision("bfloat16", "precision")
        torch.bfloat16
    """
    if value not in _PRECISIONS:
        raise ValueError(f"{what} must be one of {', '.join(_PRECISIONS)}, got {value!r}.")
    return _PRECISIONS[value]


class ActivationStore(AbstractContextManager["ActivationStore"]):
    """Storage of captured activations; leaving the context frees the memory and removes the files.

    Args:
        budget: Bytes that may be held in memory, a part of which is left to what is on its way; None for no limit. What
            is captured first has the first claim.
        precision: Type in which float32 tensors are kept; None for their own.
        folder: Folder in which a scratch folder is made when the budget is used up; the system's temporary folder if
            None.

    Attributes:
        most_held: Greatest number of bytes that were held at once, in memory and in files.

    Example:
        >>> with ActivationStore() as store:
        ...     series = store.series(1)
        ...     series.append(torch.ones(2, 3))
        ...     store.in_memory
        24
    """

    def __init__(
        self, budget: int | None = None, precision: torch.dtype | None = None, folder: str | Path | None = None
    ) -> None:
        self.budget, self.precision, self.folder = budget, precision, folder
        self.most_held = 0
        self._scratch: Scratch | None = None
        self._files = 0
        self._sizes: dict[Buffer, int] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free all buffers and remove the scratch folder."""
        for buffer in list(self._sizes):
            self.release(buffer)
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def series(self, length: int, channels_last: bool = False) -> "TensorSeries":
        """An empty series that is expected to get ``length`` tensors."""
        return TensorSeries(self, length, channels_last)

    def buffer(self, elements: int, dtype: torch.dtype, device: torch.device) -> Buffer:
        """A buffer for so many elements: in memory if the budget allows it, else in a file.

        Raises:
            OSError: If the disk has not as much free space.
        """
        size = elements * dtype.itemsize
        fits = self.budget is None or self.in_memory + size <= _SHARE_KEPT * self.budget
        buffer = MemoryBuffer(elements, dtype, device) if fits else FileBuffer(self._new_file(size), dtype)
        self._sizes[buffer] = size
        self.most_held = max(self.most_held, self.in_memory + self.on_disk)
        return buffer

    def release(self, buffer: Buffer) -> None:
        """Take a buffer back, if it has not been before."""
        if self._sizes.pop(buffer, None) is not None:
            buffer.free()

    @property
    def in_memory(self) -> int:
        """Bytes that are held in memory."""
        return sum(size for buffer, size in self._sizes.items() if isinstance(buffer, MemoryBuffer))

    @property
    def on_disk(self) -> int:
        """Bytes of the files, including those that are still to be written."""
        return sum(size for buffer, size in self._sizes.items() if isinstance(buffer, FileBuffer))

    def _new_file(self, size: int) -> Path:
        if self._scratch is None:
            self._scratch = Scratch(self.folder)
        unwritten = sum(size - buffer.written for buffer, size in self._sizes.items() if isinstance(buffer, FileBuffer))
        free = shutil.disk_usage(self._scratch.path).free - unwritten
        if size > _MOST_OF_FREE_SPACE * free:
            raise OSError(
                f"Captured activations need {size:,} bytes in {self._scratch.path}, which has {free:,} free: raise "
                'activation_budget, use precision="bfloat16" or fewer calibration samples, or name another '
                "scratch_folder."
            )
        self._files += 1
        return self._scratch.path / f"{self._files}.bin"


class TensorSeries:
    """Tensors of one type, appended one after the other and read back one by one or by rows.

    All are kept in one buffer, so that those that agree in all dimensions but the first also form one long tensor.

    Args:
        store: Store that the series belongs to.
        length: Number of tensors that are expected.
        channels_last: Whether tensors of four dimensions are kept, and rows are given, in the channels-last memory
            format.

    Attributes:
        constant: Whether all tensors so far are the same (masks that broadcast, constants); only one is then kept.

    Example:
        >>> series = ActivationStore().series(2)
        >>> for value in (1.0, 2.0):
        ...     series.append(torch.full((2, 1), value))
        >>> series.rows(torch.tensor([3, 0]))
        tensor([[2.],
                [1.]])
    """

    def __init__(self, store: ActivationStore, length: int, channels_last: bool = False) -> None:
        self._store, self._length, self._channels_last = store, length, channels_last
        self.shapes: list[torch.Size] = []
        self._starts: list[int] = []
        self._end = self._room = 0
        self._dtype = self._kept_dtype = torch.float32
        self._device = torch.device("cpu")
        self._buffer: Buffer | None = None
        self.constant = True

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def aligned(self) -> bool:
        """Whether the tensors form one long tensor along their first dimension."""
        return all(len(shape) > 0 and shape[1:] == self.shapes[0][1:] for shape in self.shapes)

    @torch.no_grad()
    def append(self, tensor: Tensor) -> None:
        """Keep a copy of a tensor.

        Raises:
            TypeError: If it is a placeholder, which has no values.
        """
        if holds_placeholder(tensor):
            raise TypeError("A placeholder has no values to keep.")
        tensor = tensor.detach()
        if not self.shapes:
            self._dtype, self._device = tensor.dtype, tensor.device
            precision = self._store.precision
            self._kept_dtype = precision if precision and tensor.dtype == torch.float32 else tensor.dtype
            self._make_room(tensor.numel())
            self._write(tensor)
        elif self.constant and self._is_the_first(tensor):
            self._starts.append(0)
        else:
            if self.constant:
                self._spread_out()
            self._write(tensor)
        self.shapes.append(tensor.shape)

    def __getitem__(self, position: int) -> Tensor:
        """A fresh copy of the tensor at ``position``."""
        kept = self._kept(position)
        return torch.empty(kept.shape, dtype=self._dtype, device=self._device).copy_(kept)

    def view(self, position: int) -> Tensor:
        """The tensor at ``position``, not to be changed, nor to be used when the series is longer or was freed."""
        return self._kept(position).to(self._device, self._dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Rows (int64, shape (n,)) of the long tensor that the aligned tensors form."""
        assert self._buffer is not None
        if self.constant:
            index = index % self.shapes[0][0]
        rows = self._buffer.rows(index, self.shapes[0][1:].numel())
        shape = torch.Size([len(index), *self.shapes[0][1:]])
        return self._shaped(rows.view(-1), shape).to(self._device, self._dtype)

    def free(self) -> None:
        """Give up what is kept; the shapes stay known."""
        if self._buffer is not None:
            self._store.release(self._buffer)
        self._buffer = None

    def like(self, position: int, make: Callable[[torch.Size, torch.dtype, torch.device], Tensor] = zeros) -> Tensor:
        """A tensor like the one at ``position``, of other values: of zeros, or whatever ``make`` makes."""
        return make(self.shapes[position], self._dtype, self._device)

    def _kept(self, position: int) -> Tensor:
        """The tensor at ``position`` as it is kept."""
        shape = self.shapes[position]
        assert self._buffer is not None
        return self._shaped(self._buffer.read(self._starts[position], shape.numel()), shape)

    def _is_the_first(self, tensor: Tensor) -> bool:
        if tensor.shape != self.shapes[0]:
            return False
        first = self._kept(0)
        # Most differ in their first row.
        return all(
            torch.equal(new.to(self._kept_dtype), old.to(new.device))
            for new, old in ((tensor[:1], first[:1]) if tensor.dim() else (tensor, first), (tensor, first))
        )

    def _spread_out(self) -> None:
        """Give each tensor so far, of which one was kept, its own place."""
        self.constant = False
        first, count = self._kept(0), len(self)
        self.free()
        self._make_room(first.numel() * max(self._length, count + 1))
        self._starts, self._end = [], 0
        for _ in range(count):
            self._write(first)

    def _make_room(self, elements: int) -> None:
        """Get a buffer; if there is one already, move its content there."""
        before, self._buffer = self._buffer, self._store.buffer(elements, self._kept_dtype, self._device)
        if before is not None:
            before.copy_to(self._buffer, self._end)
            self._store.release(before)
        self._room = elements

    def _write(self, tensor: Tensor) -> None:
        """Put a tensor behind the others."""
        start, stop = self._end, self._end + tensor.numel()
        if stop > self._room:
            self._make_room(max(stop, start * 3 // 2))
        if self._is_permuted(tensor.shape):
            tensor = tensor.permute(0, 2, 3, 1)
        assert self._buffer is not None
        self._buffer.write(start, tensor.reshape(-1).to(self._kept_dtype))
        self._starts.append(start)
        self._end = stop

    def _is_permuted(self, shape: torch.Size) -> bool:
        return self._channels_last and len(shape) == 4

    def _shaped(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """A flat stretch as a tensor."""
        if self._is_permuted(shape):
            return flat.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        return flat.view(shape)
