"""What is refused in the place of a dataloader."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .batches import is_graph


def check_loader(loader: Any, what: str, several: bool = False) -> None:
    """Refuse what does not give batches.

    Args:
        loader: What the user has given: a DataLoader, or any iterable of batches.
        what: Name of the argument, for the message.
        several: Whether a list or mapping of loaders is allowed, as Lightning takes for validation.

    Raises:
        TypeError: If it gives single samples (a tensor, a Dataset), is a batch itself (a graph), is several loaders, or
            cannot be gone through.

    Example:
        >>> import torch
        >>> check_loader([torch.zeros(8, 3)], "calibration")
        >>> check_loader(torch.zeros(8, 3), "calibration")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: calibration must give batches, got a tensor, which gives single samples: wrap it, ...
    """
    if isinstance(loader, Tensor):
        raise TypeError(
            f"{what} must give batches, got a tensor, which gives single samples: wrap it, "
            "DataLoader(TensorDataset(tensor), batch_size=32)."
        )
    if isinstance(loader, Dataset):
        raise TypeError(
            f"{what} must give batches, got the Dataset {type(loader).__name__}, which gives single samples: wrap it, "
            "DataLoader(dataset, batch_size=32)."
        )
    if is_graph(loader) and not isinstance(loader, DataLoader):
        raise TypeError(
            f"{what} must give batches, got a {type(loader).__name__}, which is one: give a list of it, [graph], or a "
            "DataLoader."
        )
    members = list(loader.values()) if isinstance(loader, Mapping) else loader
    if isinstance(members, list | tuple) and any(isinstance(member, DataLoader | Dataset) for member in members):
        if not several:
            raise TypeError(
                f"{what} is {len(members)} loaders: give one, of a torch.utils.data.ConcatDataset of their datasets, "
                "say."
            )
        for member in members:
            check_loader(member, what)
        return
    if isinstance(loader, str | bytes | Mapping | type) or not isinstance(loader, Iterable):
        given = f"the class {loader.__name__}" if isinstance(loader, type) else f"a {type(loader).__name__}"
        raise TypeError(f"{what} must be a DataLoader, or another iterable of batches, got {given}.")
