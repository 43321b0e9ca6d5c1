"""Objects of Lightning, which come from the package ``lightning`` or from ``pytorch_lightning``: they share no
classes."""

from typing import Any

_PACKAGES = ("lightning", "pytorch_lightning")


def is_a(thing: Any, kind: str) -> bool:
    """Whether an object is an instance of one of Lightning's classes, of either package.

    Args:
        thing: The object.
        kind: Name of the class: ``"LightningModule"``, ``"DDPStrategy"``.

    Example:
        >>> import lightning.pytorch as pl
        >>> is_a(pl.LightningModule(), "LightningModule"), is_a(pl.LightningModule(), "LightningDataModule")
        (True, False)
    """
    return _class_of(thing, kind) is not None


def overrides(thing: Any, method: str) -> bool:
    """Whether a user's LightningModule or LightningDataModule has a method of its own in place of Lightning's.

    Args:
        thing: The object, of either package.
        method: Name of the method.

    Example:
        >>> import lightning.pytorch as pl
        >>> class Data(pl.LightningDataModule):
        ...     def train_dataloader(self):
        ...         return []
        >>> overrides(Data(), "train_dataloader"), overrides(Data(), "val_dataloader")
        (True, False)
    """
    if method in vars(thing):
        return True
    lightnings = _class_of(thing, "LightningModule") or _class_of(thing, "LightningDataModule")
    own = getattr(type(thing), method, None)
    return own is not None and own is not getattr(lightnings, method, None)


def package_of(thing: Any) -> str:
    """Name of the package that an object's class, or the nearest one above it of Lightning's, is from.

    Example:
        >>> import lightning.pytorch as pl
        >>> package_of(pl.LightningModule())
        'lightning'
    """
    packages = (cls.__module__.split(".")[0] for cls in type(thing).__mro__)
    return next((package for package in packages if package in _PACKAGES), "")


def _class_of(thing: Any, kind: str) -> type | None:
    for cls in type(thing).__mro__:
        if cls.__name__ == kind and cls.__module__.split(".")[0] in _PACKAGES:
            return cls
    return None
