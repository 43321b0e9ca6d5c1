"""Digests of anything, by which a run recognises in another process what it was given in this one."""

import enum
import hashlib
import types
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

# These read the same in every process.
_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, torch.dtype, torch.device,
    torch.layout, torch.memory_format, torch.Size, PurePath,
)  # fmt: skip


class UnrecognizableError(ValueError):
    """Something cannot be told from another of its kind in another process; the message says what, and where.

    Example:
        See ``digest``.
    """


def digest(values: Iterable[Any]) -> str:
    """SHA-256 of tensors (type, shape and content), plain values, containers, functions and objects.

    A function is told by its code, its defaults, what it closes over, and by the functions and plain values of its own
    module that it names; an object by its class and its attributes; a module by its state as well.

    Args:
        values: Values, in a fixed order.

    Raises:
        UnrecognizableError: If something has no content that could be read: a generator, a lock, an open file.

    Example:
        >>> import torch
        >>> digest([torch.ones(2), "W4A8"]) == digest([torch.ones(2), "W4A4"])
        False
        >>> def times(factor):
        ...     return lambda x: factor * x
        >>> digest([times(2)]) == digest([times(2)]), digest([times(2)]) == digest([times(3)])
        (True, False)
        >>> digest([(x for x in "abc")])
        Traceback (most recent call last):
        ...
        lightning_calibtip.files.digest.UnrecognizableError: a generator cannot be recognised in another process
    """
    digester = _Digester()
    for value in values:
        digester.add(value)
    return digester.hash.hexdigest()


class _Digester:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        # Objects that are being read, or whose functions have been: they may contain themselves.
        self._seen: dict[int, int] = {}
        # Kept, so that no other object takes the place of one that was made on the way.
        self._alive: list[Any] = []

    def add(self, value: Any) -> None:
        value = getattr(value, "_torchdynamo_orig_callable", value)
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
            self._write(type(value).__name__, repr(value))
        elif isinstance(value, type):
            self._name(value)
        elif isinstance(value, types.ModuleType):
            self._write("module", value.__name__)
        elif id(value) in self._seen:
            self._write("seen", str(self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
            self._add_structure(value)

    def _add_structure(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self._name(type(value))
            self._write("length", str(len(value)))
            for key, inner in value.items():
                self.add(key)
                self.add(inner)
        elif isinstance(value, set | frozenset):
            self._write("set", repr(sorted(digest([inner]) for inner in value)))
        elif isinstance(value, list | tuple):
            self._write(type(value).__name__, str(len(value)))
            for inner in value:
                self.add(inner)
        elif isinstance(value, types.CodeType):
            self._add_all("code", value.co_code, value.co_names, value.co_freevars, value.co_consts)
        elif isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            self._add_all("function", value.__code__, value.__defaults__, value.__kwdefaults__, cells, _named(value))
        elif isinstance(value, types.MethodType):
            self._add_all("method", value.__func__, value.__self__)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            self._write("builtin", f"{getattr(value, '__module__', '')}.{value.__qualname__}")
            if (owner := getattr(value, "__self__", None)) is not None and not isinstance(owner, types.ModuleType):
                self.add(owner)
        elif isinstance(value, partial):
            self._add_all("partial", value.func, value.args, value.keywords)
        else:
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        kind = type(value)
        self._name(kind)
        if isinstance(call := kind.__dict__.get("__call__"), types.FunctionType):
            self.add(call)
        if isinstance(value, nn.Module):
            self.add(value.state_dict())
            for name, module in value.named_modules():
                plain = {key: inner for key, inner in vars(module).items() if not key.startswith("_")}
                self._add_all(name, type(module), plain)
                if isinstance(forward := type(module).__dict__.get("forward"), types.FunctionType):
                    self.add(forward)
        elif hasattr(value, "__array__") and hasattr(value, "tobytes"):
            self._write("array", f"{value.dtype}{value.shape}")
            # An array of objects holds their addresses.
            self.add(value.tolist() if value.dtype.hasobject else value.tobytes())
        elif isinstance(value, enum.Enum):
            self._write("enum", value.name)
        elif (content := _as_dict(value)) is not None:
            self.add(content)
        elif hasattr(value, "__dict__") or hasattr(kind, "__slots__"):
            slots = [name for each in kind.__mro__ for name in _slots(each) if hasattr(value, name)]
            self.add({**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})})
        else:
            raise UnrecognizableError(f"a {kind.__name__} cannot be recognised in another process")

    def _add_all(self, *values: Any) -> None:
        for value in values:
            self.add(value)

    def _add_tensor(self, value: Tensor) -> None:
        try:
            flat = value.detach().to_dense().resolve_conj().resolve_neg().cpu().contiguous().view(-1)
            content = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise UnrecognizableError(f"a {type(value).__name__} of {value.layout} has no content to read") from error
        self._write("tensor", f"{value.dtype}{tuple(value.shape)}")
        self.hash.update(content)

    def _name(self, kind: type) -> None:
        self._write("type", f"{kind.__module__}.{kind.__qualname__}")

    def _write(self, tag: str, content: str) -> None:
        """Write a piece with its length, so that no two sequences of pieces read alike."""
        piece = content.encode()
        self.hash.update(f"{tag}:{len(piece)}:".encode() + piece)


def _as_dict(value: Any) -> Any:
    """What an object with ``to_dict()`` says of itself (a batch of PyTorch Geometric, whose attributes refer to each
    other); None if it says nothing."""
    try:
        return value.to_dict() if callable(getattr(value, "to_dict", None)) else None
    except TypeError:
        # It needs arguments.
        return None


def _slots(kind: type) -> Iterable[str]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _named(function: types.FunctionType) -> dict[str, Any]:
    """Functions and plain values of the function's own module that its code names; what comes from elsewhere is told by
    its name."""
    found = {}
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        own = isinstance(value, types.FunctionType) and value.__module__ == function.__module__
        if own or isinstance(value, Tensor | bool | int | float | str | list | tuple | dict):
            found[name] = value
    return found


def _names(code: types.CodeType) -> set[str]:
    """Names of globals in a function's code and in functions inside."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))
