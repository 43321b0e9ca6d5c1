"""Report items and checkpoints for whatever loggers a Trainer has: W&B gets tables and images, TensorBoard figures."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .item import ReportItem


def log_items(loggers: Iterable[Any], stage: str, items: Sequence[ReportItem], step: int) -> None:
    """Log report items under ``<stage>/<item>``, as far as a logger takes tables or pictures.

    Args:
        loggers: Loggers of Lightning; those that take neither are left alone.
        stage: First part of the keys.
        items: What is logged.
        step: Step for pictures that need one.

    Example:
        >>> from lightning_calibtip.report.layers import draw_bit_widths
        >>> class Tables:
        ...     experiment = None
        ...     def log_table(self, key, columns, data):
        ...         print(key, columns, data)
        >>> item = ReportItem("layers", "Layers", ["layer"], [["conv1"]], lambda: draw_bit_widths({}))
        >>> log_items([Tables()], "run", [item], step=0)
        run/layers_table ['layer'] [['conv1']]
    """
    for logger in loggers:
        for item in items:
            key = f"{stage}/{item.name}"
            if hasattr(logger, "log_table"):
                logger.log_table(f"{key}_table", columns=list(item.columns), data=[list(row) for row in item.rows])
            if item.png is None:
                continue
            if hasattr(logger, "log_image"):
                from PIL import Image

                # W&B drops what comes with an earlier step than it has seen.
                logger.log_image(key, [Image.open(io.BytesIO(item.png))])
            elif hasattr(logger.experiment, "add_figure"):
                logger.experiment.add_figure(key, item.draw(), step)


def log_checkpoint(loggers: Iterable[Any], path: Path) -> None:
    """Log a checkpoint as an artifact, under the name of its file, to the loggers that keep artifacts (W&B).

    Args:
        loggers: Loggers of Lightning.
        path: File of the checkpoint.

    Example:
        >>> log_checkpoint([], Path("quantized.ckpt"))
    """
    for logger in loggers:
        if hasattr(logger.experiment, "log_artifact") and hasattr(logger, "log_table"):
            logger.experiment.log_artifact(str(path), name=f"{path.stem}-{logger.experiment.id}", type="model")
