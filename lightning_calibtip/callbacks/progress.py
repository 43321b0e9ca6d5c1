"""A stage's progress through the Trainer's own progress bar, TQDM's or Rich's."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override

from ..calibration.progress import ProgressCallback, no_progress


def shows_progress(trainer: pl.Trainer) -> bool:
    """Whether the Trainer shows anything of its progress, on a terminal or in a file.

    Example:
        >>> shows_progress(pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False))
        False
    """
    bar: Any = trainer.progress_bar_callback
    return bar is not None and not getattr(bar, "is_disabled", False)


class NoBar(ProgressBar):
    """Stands for a progress bar in a file, where Lightning's own would write a line for every step.

    Example:
        See ``progress_options``.
    """

    is_enabled, is_disabled = True, False

    @override
    def enable(self) -> None:
        """There is nothing to show."""

    @override
    def disable(self) -> None:
        """There is nothing to hide."""


def progress_options(trainer: pl.Trainer) -> dict[str, Any]:
    """Options by which another Trainer, while this one still exists, shows its progress as this one does: by a bar of
    the same kind on a terminal, by a line for each stage in a file. A live Rich display of this one ends here, for
    there can be only one.

    Example:
        >>> progress_options(pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False))
        {'enable_progress_bar': False}
    """
    bar: Any = trainer.progress_bar_callback
    if not shows_progress(trainer):
        return {"enable_progress_bar": False}
    if not _on_terminal():
        return {"enable_progress_bar": True, "callbacks": [NoBar()]}
    if isinstance(bar, RichProgressBar):
        bar._stop_progress()
        return {"enable_progress_bar": True, "callbacks": [RichProgressBar()]}
    refresh_rate = bar.refresh_rate if isinstance(bar, TQDMProgressBar) else 1
    return {"enable_progress_bar": True, "callbacks": [TQDMProgressBar(refresh_rate=refresh_rate)]}


@contextmanager
def stage_progress(trainer: pl.Trainer, name: str) -> Iterator[ProgressCallback]:
    """Inside, the progress of a stage is shown by a bar under its name; not in files, which would get a line for every
    step.

    Args:
        trainer: Trainer whose progress bar is used; without one, nothing is shown.
        name: Name of the stage.

    Example:
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        >>> with stage_progress(trainer, "AdaQuant") as progress:
        ...     progress(1, 2, "conv1")
    """
    bar: Any = trainer.progress_bar_callback
    if not shows_progress(trainer) or not _on_terminal():
        yield no_progress
    elif isinstance(bar, RichProgressBar) and bar.progress is not None:
        with _rich(bar, name) as progress:
            yield progress
    elif isinstance(bar, TQDMProgressBar):
        with _tqdm(name) as progress:
            yield progress
    else:
        yield no_progress


def _on_terminal() -> bool:
    # While a Rich display is live it stands in front of the terminal, and older releases do not say that it is one.
    return bool(getattr(sys.stdout, "rich_proxied_file", sys.stdout).isatty())


@contextmanager
def _tqdm(name: str) -> Iterator[ProgressCallback]:
    # Below the bar of the epoch, which is still there.
    with Tqdm(desc=name, position=1, leave=False, dynamic_ncols=True, file=sys.stdout) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(f"{name}: {what}", refresh=True)

        yield progress


@contextmanager
def _rich(bar: Any, name: str) -> Iterator[ProgressCallback]:
    display = bar.progress
    task = display.add_task(name, total=1.0)

    def progress(done: int, total: int, what: str) -> None:
        display.update(task, completed=done, total=total, description=f"{name}: {what}")
        display.refresh()

    try:
        yield progress
    finally:
        display.remove_task(task)
        display.refresh()
