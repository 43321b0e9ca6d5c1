"""Calibration: choose the ranges of activations and weights from what one epoch shows."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from ..files.state_folder import remove_state
from ..module import QuantizationModule
from ..network.protection import protecting, require_nodes
from ..network.tensors import ObservedTensor
from ..quantization.ranges import RangeOptions
from ..quantization.spec import TensorSpec
from ..tuning.joint_search import search_jointly
from ..tuning.measured import FILE_NAME
from .options import merge_fields
from .stage import Stage, StageResult

log = logging.getLogger(__name__)


class Calibration(Stage):
    """Observes activations during the calibration epoch, chooses all ranges at its end and switches quantization on.

    BatchNorms are folded into the layers before them on the first batch. Only calibration batches move an observer.

    Args:
        options: How ranges are chosen; the defaults of ``RangeOptions`` if None.
        state_folder: Folder for what the joint search has measured: a run that was killed and is repeated is resumed
            from there. None to keep nothing. See ``AdaQuant``.
        **changes: Fields of ``RangeOptions`` that differ: ``observer``, ``weight_observer``, ``percentile``, ...

    Raises:
        TypeError: If an option does not exist.
        ValueError: If a value is out of its range.

    Example:
        >>> stage = Calibration(observer="percentile", percentile=99.9)
        >>> stage.options.observer, stage.options.weight_observer
        ('percentile', 'mse')
    """

    def __init__(
        self, options: RangeOptions | None = None, *, state_folder: str | Path | None = None, **changes: Any
    ) -> None:
        super().__init__()
        self.state_folder = None if state_folder is None else Path(state_folder)
        changes = merge_fields(self.name, RangeOptions, options, changes)
        self.options = RangeOptions(**changes)
        self._generator = torch.Generator()

    @override
    def clean_up(self) -> None:
        """Remove what was kept in the state folder, and the folder if nothing else is in it."""
        remove_state(self.state_folder, [FILE_NAME])

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Called after each calibration batch: let the observers see it."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert isinstance(pl_module, QuantizationModule)
        if batch_idx == 0:
            pl_module.network.attach_observers(self.options)
            self._generator.manual_seed(self.options.seed)
        network, precision = pl_module.network, trainer.precision_plugin
        for index in pl_module.latest_batches:
            tokens, layers = pl_module.calibration.tokens(index), list(network.layers.values())
            protection = protecting(network.model, layers, self.options.protection, self._generator)
            with protection, network.observing(tokens), torch.no_grad(), precision.forward_context():
                pl_module.calibration.run(index)

    @override
    def check_plan(self, module: QuantizationModule) -> None:
        """Refuse to protect nodes where there are none."""
        super().check_plan(module)
        require_nodes(list(module.network.layers.values()), self.options.protection, self.name)

    @override
    def run(self, module: QuantizationModule) -> StageResult:
        """Choose the ranges."""
        module.network.fit_ranges()
        if constant := [tensor.name for tensor in module.network.tensors if _is_constant(tensor)]:
            log.warning(
                "%s: the same value in all calibration batches, so the range fits no other (%d tensors): are these the "
                "data of the task?",
                ", ".join(constant[:3]),
                len(constant),
            )
        figures = {"layers": float(len(module.network.layers)), "samples": float(module.calibration.samples)}
        searched = ""
        if self.options.search == "joint":
            result = search_jointly(module.network, module.calibration, self.options, self.progress, self.state_folder)
            figures |= {
                "p": result.p,
                "divergence_before": result.divergence_before,
                "divergence_after": result.divergence_after,
                "evaluations": float(result.evaluations),
            }
            before, after = result.divergence_before, result.divergence_after
            searched = f" The joint search moved the divergence from the float model from {before:.4g} to {after:.4g}."
        chosen = f"activations by {self.options.observer!r}, weights by {self.options.weight_observer!r}"
        return StageResult(
            figures, outcome=f"Ranges of {len(module.network.layers)} layers were chosen ({chosen}).{searched}"
        )


def _is_constant(tensor: ObservedTensor) -> bool:
    """Whether all values that were observed are alike; a range that the observer has chosen says so."""
    if tensor.observer is None or not tensor.observed:
        return False
    low, high = tensor.observer.compute_range(TensorSpec(8))
    return bool((low == high).all())
