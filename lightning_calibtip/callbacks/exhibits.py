"""Exhibits to whatever loggers the Trainer has: W&B gets tables and images, TensorBoard figures, others nothing."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..report.exhibit import Exhibit


def log_exhibits(loggers: Iterable[Any], stage: str, exhibits: Sequence[Exhibit], step: int) -> None:
    """Log each exhibit under ``<stage>/<exhibit>`` as far as a logger takes tables or pictures."""
    for logger in loggers:
        for exhibit in exhibits:
            key = f"{stage}/{exhibit.name}"
            if hasattr(logger, "log_table"):
                logger.log_table(
                    f"{key}_table", columns=list(exhibit.columns), data=[list(row) for row in exhibit.rows]
                )
            if exhibit.png is None:
                continue
            if hasattr(logger, "log_image"):
                from PIL import Image

                # W&B drops what comes with an earlier step than it has seen.
                logger.log_image(key, [Image.open(io.BytesIO(exhibit.png))])
            elif hasattr(logger.experiment, "add_figure"):
                logger.experiment.add_figure(key, exhibit.draw(), step)


def log_checkpoint(loggers: Iterable[Any], path: Path) -> None:
    """Give a checkpoint to the loggers that keep artifacts (W&B), under the name of its file."""
    for logger in loggers:
        if hasattr(logger.experiment, "log_artifact") and hasattr(logger, "log_table"):
            logger.experiment.log_artifact(str(path), name=f"{path.stem}-{logger.experiment.id}", type="model")
