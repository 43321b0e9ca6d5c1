"""Which part of a batch goes to the model, and as which arguments."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_origin

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .batches import content_of, is_graph, is_object, plain, shallow_copy


def batch_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a model's ``forward`` in a batch.

    A tensor is passed as it is. Of a tuple or list the first element is, or the first ones, where ``forward`` needs
    several. Of a mapping the entries that ``forward`` takes are passed by name, or the mapping itself where its single
    argument is a mapping by its annotation, or is called ``batch``. Of an object with ``to_dict()`` (a graph) they are
    passed by name where ``forward`` needs several, and those of a graph where it needs nothing else; otherwise the
    object itself is. The same goes for a graph that is the first element of a tuple.

    Args:
        model: The model.
        batch: A batch.

    Returns:
        Positional arguments, and those by name.

    Raises:
        ValueError: If the batch is empty, has fewer elements than ``forward`` needs, or is a mapping that does not fit.

    Example:
        >>> class Pair(nn.Module):
        ...     def forward(self, left, right, scale=1.0):
        ...         return left + right
        >>> batch_arguments(Pair(), (1, 2, "label"))
        ((1, 2), {})
        >>> batch_arguments(Pair(), {"left": 1, "right": 2, "label": 3})
        ((), {'left': 1, 'right': 2})
    """
    name, parameters = type(model).__name__, inspect.signature(model.forward).parameters
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters.values() if p.kind in positional and p.default is inspect.Parameter.empty]
    if isinstance(batch, Mapping):
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        taken = {key: value for key, value in batch.items() if takes_any or key in parameters}
        if taken:
            return (), {key: shallow_copy(value) for key, value in taken.items()}
        if len(needed) == 1 and _takes_mapping(parameters[needed[0]]):
            return (batch,), {}
        raise ValueError(
            f"No entry of the calibration batch ({', '.join(map(str, batch))}) is an argument of "
            f"{name}.forward ({', '.join(parameters)}): give your module a method calibration_step(batch, batch_idx) "
            "that returns its logits."
        )
    if is_object(batch):
        return _of_object(name, parameters, needed, batch)
    if not isinstance(batch, tuple | list):
        return (batch,), {}
    if batch and is_graph(batch[0]):
        return _of_object(name, parameters, needed, batch[0])
    count = max(1, len(needed))
    if len(batch) < count:
        raise ValueError(
            f"The calibration batch has {len(batch)} elements, and {name}.forward needs {', '.join(needed) or 'one'}: "
            "give your module a method calibration_step(batch, batch_idx) that returns its logits."
        )
    return tuple(shallow_copy(each) for each in batch[:count]), {}


def _of_object(
    name: str, parameters: Mapping[str, inspect.Parameter], needed: list[str], batch: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in a batch that is an object, which the model may change: they get a copy that shares its tensors."""
    content = content_of(batch) or {}
    taken = {key: value for key, value in content.items() if key in parameters}
    first = next(iter(parameters.values()), None)
    by_name = is_graph(batch) and bool(taken) and not (first is not None and _takes_whole(first, batch))
    if len(needed) < 2 and not (by_name and all(each in taken for each in needed)):
        return (shallow_copy(batch),), {}
    if missing := [each for each in needed if each not in taken]:
        raise ValueError(
            f"The calibration batch, a {type(batch).__name__} of {', '.join(map(str, content))}, has no "
            f"{', '.join(missing)}, which {name}.forward needs: give your module a method calibration_step(batch, "
            "batch_idx) that returns its logits."
        )
    return ((), taken) if taken else ((shallow_copy(batch),), {})


def _takes_whole(parameter: inspect.Parameter, batch: Any) -> bool:
    annotation = get_origin(parameter.annotation) or parameter.annotation
    is_its_class = isinstance(annotation, type) and annotation is not object and isinstance(batch, annotation)
    return parameter.name == "batch" or is_its_class


def _takes_mapping(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    origin = get_origin(annotation) or annotation
    return parameter.name == "batch" or (isinstance(origin, type) and issubclass(origin, Mapping))


def describe_batch(inputs: Any) -> str:
    """Types and shapes of what a model is given, for messages.

    Example:
        >>> import torch
        >>> describe_batch((torch.zeros(2, 3), [1]))
        'float32 (2, 3), int'
    """
    leaves = tree_leaves(plain(inputs))
    return ", ".join(
        f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
        if isinstance(leaf, Tensor)
        else type(leaf).__name__
        for leaf in leaves[:8]
    )


@contextmanager
def naming_batch(inputs: Any) -> Iterator[None]:
    """Inside, what the model raises about a batch tells the shapes of it.

    Args:
        inputs: What the model is given.

    Example:
        >>> with naming_batch([1.5]):
        ...     raise RuntimeError("no.")
        Traceback (most recent call last):
        ...
        RuntimeError: The model failed on the first calibration batch (float): no.
    """
    try:
        yield
    except (RuntimeError, TypeError, IndexError) as error:
        if type(error) not in (RuntimeError, TypeError, IndexError):
            raise
        shapes = describe_batch(inputs)
        raise type(error)(f"The model failed on the first calibration batch ({shapes}): {error}") from error
