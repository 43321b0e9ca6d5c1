"""Options that make the Trainers of a run like the user's own."""

from typing import Any

import lightning.pytorch as pl


def validation_limit(trainer: pl.Trainer) -> dict[str, Any]:
    """The limit of validation batches of a Trainer, if it has one.

    Args:
        trainer: The Trainer.

    Example:
        >>> validation_limit(pl.Trainer(accelerator="cpu", logger=False, limit_val_batches=1))
        {'limit_val_batches': 1}
        >>> validation_limit(pl.Trainer(accelerator="cpu", logger=False))
        {}
    """
    limit = trainer.limit_val_batches
    # 1.0 is all batches, 1 is one of them.
    return {} if isinstance(limit, float) and limit == 1.0 else {"limit_val_batches": limit}
