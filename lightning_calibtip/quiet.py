"""What Lightning says of every Trainer and of every calibration, where it is meant to be so."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning.pytorch as pl
from typing_extensions import override

# Of a calibration: an epoch without optimizer, validation and gradients, of a model in eval mode.
_EXPECTED_WARNINGS = (
    ".*configure_optimizers.* returned `None`",
    ".*does not have many workers.*",
    ".*defined a `validation_step` but have no `val_dataloader`.*",
    ".*max_epochs. was not set.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*isinstance\(treespec, LeafSpec\)..*deprecated.*",
    ".*smaller than the logging interval.*",
)

# Of every Trainer that is made: devices, precision, and what else could be installed.
_SETUP_MESSAGES = (
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "Using 16bit Automatic Mixed Precision",
    "Using bfloat16 Automatic Mixed Precision",
    "💡 Tip:",
)


def _is_no_setup_message(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_SETUP_MESSAGES)


@contextmanager
def quiet_trainers() -> Iterator[None]:
    """Inside, Trainers that are made say nothing of devices, precision and packages to install, and calibrations give
    no warnings of what is meant. All other messages are shown.

    Example:
        >>> with quiet_trainers():
        ...     trainer = pl.Trainer(accelerator="cpu", logger=False)
    """
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_is_no_setup_message)
    try:
        with warnings.catch_warnings():
            _ignore_expected()
            yield
    finally:
        logger.removeFilter(_is_no_setup_message)


def _ignore_expected() -> None:
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)


class ExpectedWarnings(pl.Callback):
    """Ignores, from ``begin`` to the end of ``fit``, warnings of what is meant in a calibration.

    Example:
        >>> ignoring = ExpectedWarnings()
        >>> ignoring.begin()
        >>> ignoring.end()
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def begin(self) -> None:
        """Ignore them from now on."""
        self.end()
        self._stack.enter_context(warnings.catch_warnings())
        _ignore_expected()

    def end(self) -> None:
        """Show them again."""
        self._stack.close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when ``fit`` ends."""
        self.end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when ``fit`` breaks off."""
        self.end()
