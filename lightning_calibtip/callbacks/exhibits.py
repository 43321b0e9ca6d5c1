"""Exhibits to whatever loggers the Trainer has: W&B gets tables and images, TensorBoard figures, others nothing."""

import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..report.exhibit import Exhibit

log = logging.getLogger(__name__)


def log_exhibits(loggers: Iterable[Any], stage: str, exhibits: Sequence[Exhibit], step: int) -> None:
    """Log each exhibit under ``<stage>/<exhibit>`` as far as a logger takes tables or pictures."""
    for logger in loggers:
        for exhibit in exhibits:
            key = f"{stage}/{exhibit.name}"
            if hasattr(logger, "log_table"):
                logger.log_table(
                    f"{key}_table", columns=list(exhibit.columns), data=[list(row) for row in exhibit.rows]
                )
            takes_images, takes_figures = hasattr(logger, "log_image"), hasattr(logger.experiment, "add_figure")
            figure = _draw(exhibit) if takes_images or takes_figures else None
            if figure is not None and takes_images:
                logger.log_image(key, [_image(figure)], step=step)
            elif figure is not None:
                logger.experiment.add_figure(key, figure, step)


def log_checkpoint(loggers: Iterable[Any], path: Path) -> None:
    """Give a checkpoint to the loggers that keep artifacts (W&B), under the name of its file."""
    for logger in loggers:
        if hasattr(logger.experiment, "log_artifact") and hasattr(logger, "log_table"):
            logger.experiment.log_artifact(str(path), name=f"{path.stem}-{logger.experiment.id}", type="model")


def _draw(exhibit: Exhibit) -> Any:
    """The figure, or None without matplotlib."""
    try:
        return exhibit.draw()
    except ModuleNotFoundError as error:
        log.info("%s is not drawn: %s (pip install matplotlib).", exhibit.name, error)
        return None


def _image(figure: Any) -> Any:
    from PIL import Image

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return Image.open(content)
