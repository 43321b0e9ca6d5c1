"""A network of the user's own, made by a callable that is named as ``module:callable``."""

import inspect
from importlib import import_module
from pathlib import Path

from torch import nn

from .checkpoint import load_weights
from .torchvision_networks import is_file_name


def load_own_network(name: str, weights: str | None = None) -> nn.Module:
    """Call a function, or a class, of an importable module.

    Args:
        name: ``"package.module:callable"``; the callable takes no arguments and returns a module.
        weights: A checkpoint file to load into it; None to take it as it is returned.

    Raises:
        ModuleNotFoundError: If there is no such module.
        AttributeError: If the module has no such attribute.
        TypeError: If that is not callable without arguments, or returns something else than a module.
        FileNotFoundError: If ``weights`` is named like a file and there is none.
        ValueError: If ``name`` has another form, ``weights`` are something else, or the file is of another network.
    """
    path, _, attribute = name.partition(":")
    if not path or not attribute.isidentifier() or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"model must be of the form module:callable, such as my_package.networks:make, got {name!r}.")
    if weights is not None and not is_file_name(weights):
        raise ValueError(
            f"weights={weights!r} means nothing to {name}: give a checkpoint file, or leave them out to take the "
            "network as it is returned."
        )
    net = _call(path, attribute, name)
    if weights is not None:
        load_weights(net, Path(weights), name)
    return net


def _call(path: str, attribute: str, name: str) -> nn.Module:
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        # What the user's module itself cannot import is not a wrong name.
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise ModuleNotFoundError(
            f"model={name!r}: there is no module {error.name!r} on Python's path; start from the folder it is in, or "
            "set PYTHONPATH.",
            name=error.name,
        ) from error
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise AttributeError(
            f"model={name!r}: module {path} has no {attribute!r}, only {', '.join(public) or 'nothing'}."
        )
    make = getattr(module, attribute)
    if isinstance(make, nn.Module):
        raise TypeError(f"model={name!r}: {attribute} is a network itself; name a function that returns it.")
    if not callable(make):
        raise TypeError(
            f"model={name!r}: {attribute} must be a callable that returns an nn.Module, not of type "
            f"{type(make).__name__}."
        )
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise TypeError(
            f"model={name!r}: {attribute} must be callable without arguments and return an nn.Module, but: {error}. "
            "Wrap it in a function that gives them."
        ) from error
    net = make()
    if not isinstance(net, nn.Module):
        raise TypeError(f"model={name!r}: {attribute}() must return an nn.Module, not {type(net).__name__}.")
    return net
