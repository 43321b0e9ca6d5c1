"""What a run sees of the user's validation and of the model's work, besides the values that are logged."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric
from typing_extensions import override

from ..allocation.work import Work, measure_work
from ..batches import plain
from ..module import QuantizationModule
from ..report.metrics import Validation

log = logging.getLogger(__name__)


class ValidationObserver(pl.Callback):
    """Counts the samples of a validation, and notes of the metric objects that it logs which way they are better.

    Example:
        >>> ValidationObserver().validation
        Validation(higher_is_better={}, samples=[])
    """

    def __init__(self) -> None:
        self._samples: dict[int, int | None] = {}
        self._higher_is_better: dict[str, bool] = {}

    @property
    def validation(self) -> Validation:
        """What was seen; no numbers of samples where they could not be told of a batch."""
        counts = [self._samples[index] for index in sorted(self._samples)]
        known = [count for count in counts if count is not None]
        return Validation(dict(self._higher_is_better), known if len(known) == len(counts) else ())

    @contextmanager
    def noting(self, module: pl.LightningModule) -> Iterator[None]:
        """Inside, what the module logs is seen.

        Args:
            module: The module that the Trainer validates.
        """
        log_value = module.log

        def noting(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(value, Metric) and value.higher_is_better is not None:
                self._higher_is_better[name] = value.higher_is_better
            log_value(name, value, *args, **kwargs)

        module.log = noting  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.log

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after each validation batch: count its samples. A sampler of several processes may repeat some."""
        lengths = {len(leaf) for leaf in tree_leaves(plain(batch)) if isinstance(leaf, Tensor) and leaf.dim()}
        before = self._samples.get(dataloader_idx, 0)
        is_clear = len(lengths) == 1 and trainer.world_size == 1
        self._samples[dataloader_idx] = before + lengths.pop() if is_clear and before is not None else None


class WorkObserver(pl.Callback):
    """Counts, on the first calibration batch, what each layer does.

    Example:
        >>> WorkObserver().work is None
        True
    """

    def __init__(self) -> None:
        self.work: Mapping[str, Work] | None = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each calibration batch; the first one has shown the layers."""
        if batch_idx > 0:
            return
        assert isinstance(pl_module, QuantizationModule)
        try:
            self.work = measure_work(pl_module.network, pl_module.calibration, warns=False)
        except Exception as error:
            # A figure of the report is no reason to lose the run.
            log.warning("The model's bit operations are not known (%s: %s).", type(error).__name__, error)
