"""QuantizationModule: a LightningModule around the user's own, whose layers are quantized."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import _load as load_file
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from typing_extensions import override

from . import ranks
from .batch_arguments import batch_arguments, naming_batch
from .calibration.calibration_set import CalibrationSet, attention_mask
from .calibration.divergences import Divergence, FirstOutput
from .calibration.shared_batches import batches_of_all_ranks
from .files.damage import describe_error
from .lightning_types import is_a, overrides
from .loaders import check_loader
from .network.attention import transformers_models
from .network.checkpoint import CHECKPOINT_KEY, NOT_OURS, pack_network, require_own, require_readable, unpack_network
from .network.network import QuantizedNetwork
from .network.scheme import QuantizationScheme
from .network.summary import LayerSummary
from .option_fields import field_names, with_changes
from .quiet import ExpectedWarnings
from .report.table import layer_table
from .user_model import check_model, copy_of

ValidationStep = Callable[["QuantizationModule", Any, int], Any]

_PREFIX = "model."
_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_DATA_HOOKS = (
    "prepare_data", "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader", *_BATCH_HOOKS,
)  # fmt: skip


def _delegated(name: str) -> Callable[..., Any]:
    """A hook that calls the wrapped module's hook of the same name, where there is one."""

    def hook(self: "QuantizationModule", *args: Any, **kwargs: Any) -> Any:
        inner = getattr(self.model, name, None)
        if inner is None:
            return None
        with self._logging_through():
            return inner(*args, **kwargs)

    hook.__name__ = name
    hook.__doc__ = f"Calls ``{name}`` of the wrapped module, with any signature."
    return hook


class QuantizationModule(pl.LightningModule):
    """Wraps a trained model so that Lightning's Trainer calibrates, reconstructs and evaluates it quantized.

    The model is copied; the original stays as it is. Every Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear and Embedding,
    subclasses included, and in models of transformers both matrix products of attention, is quantized once a
    ``Calibration`` callback has run. ``fit`` with the stage callbacks is the calibration:
    one epoch over the calibration data, without an optimizer, the model in eval mode throughout. ``validation_step``,
    ``test_step``, ``predict_step`` and ``forward`` are the wrapped module's own.

    Args:
        model: A trained ``LightningModule``, or any ``nn.Module``.
        scheme: Bit-widths and number formats; the defaults of ``QuantizationScheme`` if None.
        validation_step: For a plain ``nn.Module``: called as ``validation_step(module, batch, batch_idx)``, where
            ``module`` is this one (for ``module(x)`` and ``module.log``), for validation and test.
        **changes: Fields of ``QuantizationScheme`` that differ from ``scheme``: ``weight_bits=4``, ``group_size=32``,
            ``overrides={"head": None}``, ``target="onnxruntime"``, ...

    Raises:
        ValueError: If the model is quantized already, has no quantizable layer, a bit-width is out of its range, or an
            override matches no layer.
        TypeError: If ``scheme`` is no ``QuantizationScheme``, or one of ``changes`` is none of its fields.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> QuantizationModule(net, weight_bits=4, activation_bits=None).hparams["weight_bits"]
        4
        >>> QuantizationModule(net, weight_bits=4, overrides={"9": 8})
        Traceback (most recent call last):
        ...
        ValueError: overrides['9'] matches no quantizable layer; the layers are: 0, 2.
    """

    def __init__(
        self,
        model: nn.Module,
        scheme: QuantizationScheme | None = None,
        *,
        validation_step: ValidationStep | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        if scheme is not None and not isinstance(scheme, QuantizationScheme):
            raise TypeError(
                f"scheme must be a QuantizationScheme, got {scheme!r}; its fields are given by name: weight_bits=4."
            )
        scheme = with_changes(scheme or QuantizationScheme(), changes, type(self).__name__)
        self.save_hyperparameters(scheme.to_dict())
        if isinstance(model, QuantizationModule):
            raise ValueError("The model is already a QuantizationModule; wrap the float model instead.")
        if validation_step is not None and not callable(validation_step):
            raise TypeError(f"validation_step must be a function (module, batch, batch_idx), got {validation_step!r}.")
        model = check_model(model)
        self.model = copy_of(model).eval()
        self.network = QuantizedNetwork(self.model, scheme)
        self.calibration = CalibrationSet(self.calibration_step, self.token_mask)
        self.calibration_done = False
        self._first_output: FirstOutput | None = None
        # Positions of the batches that the last training step has kept.
        self.latest_batches = range(0)
        self.automatic_optimization = False
        self._validation_step = validation_step
        self._is_lightning = is_a(self.model, "LightningModule")
        if self._is_lightning:
            for name in _DATA_HOOKS:
                if overrides(self.model, name):
                    setattr(self, name, getattr(self.model, name))

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward, with any signature."""
        return self.model(*args, **kwargs)

    def calibration_step(self, batch: Any, batch_idx: int) -> Any:
        """Pass a calibration batch through the model and return its output (the logits). Override it for other batches,
        or give your own module a method of this name, which is called instead.

        By default a tensor is passed as it is, of a tuple or list the first element (the first ones, where ``forward``
        needs several), of a mapping the entries that the model's ``forward`` takes.

        Raises:
            ValueError: If the batch does not fit ``forward``.
        """
        own = getattr(self.model, "calibration_step", None)
        if own is not None:
            return own(batch, batch_idx)
        args, kwargs = batch_arguments(self.model, batch)
        return self.model(*args, **kwargs)

    def token_mask(self, batch: Any) -> Tensor | None:
        """Mask of the tokens of a calibration batch that count: padding does not. Override it for other batches.

        By default the ``attention_mask`` of a mapping, if it has one of shape (batch, positions). Not for an encoder
        with a decoder: the mask is the encoder's, and what belongs to the decoder cannot be told apart by its shape.

        Returns:
            Bool, shape (batch, positions), or None if all count.
        """
        models = transformers_models(self.model).values()
        if any(getattr(model.config, "is_encoder_decoder", False) for model in models):
            return None
        return attention_mask(batch)

    def inputs_of(self, batch: Any) -> Any:
        """The part of a calibration batch that ``calibration_step`` passes on; all of it where it is the user's own."""
        is_default = type(self).calibration_step is QuantizationModule.calibration_step
        if not is_default or hasattr(self.model, "calibration_step"):
            return batch
        args, kwargs = batch_arguments(self.model, batch)
        return kwargs or (args[0] if len(args) == 1 else args)

    def take_batch_hooks(self, datamodule: pl.LightningDataModule | None) -> None:
        """Let batches go through the hooks of a DataModule (transforms on the device, transfer), where it has any."""
        for name in _BATCH_HOOKS:
            if datamodule is not None and overrides(datamodule, name):
                setattr(self, name, getattr(datamodule, name))

    @contextmanager
    def quantized(self, enabled: bool) -> Iterator[None]:
        """Inside, the model computes quantized (True), or as the float model that was passed in, with BatchNorms folded
        (False)."""
        with self.network.quantized(enabled):
            yield

    def layer_summary(self) -> list[LayerSummary]:
        """Status of each layer: quantized at which bit-widths, folded, or float and why."""
        return self.network.summary()

    def print_summary(self) -> None:
        """Print the layer summary as a table."""
        # Without a Trainer there is one process.
        show = print if self._trainer is None else self.print
        show(layer_table(self.layer_summary()))

    # What follows is called by the Trainer.

    @override
    def train(self, mode: bool = True) -> "QuantizationModule":
        """Set the mode of this module; the wrapped model stays in eval mode."""
        super().train(mode)
        if "model" in self._modules:
            self.model.eval()
        return self

    @override
    def setup(self, stage: str) -> None:
        """Leave the module as it is under DDP: nothing is trained by gradients of the whole model, and
        ``DistributedDataParallel`` refuses modules without trainable parameters."""
        if isinstance(strategy := self.trainer.strategy, DDPStrategy):
            strategy.configure_ddp = lambda: None  # type: ignore[method-assign]

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        """Keep Lightning's warnings of what is meant in a calibration from the user."""
        if self.trainer.state.fn != "fit":
            return []
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        present = [callback for callback in callbacks if isinstance(callback, ExpectedWarnings)]
        ignoring = present[0] if present else ExpectedWarnings()
        ignoring.begin()
        return [] if present else [ignoring]

    @override
    def configure_optimizers(self) -> None:
        """Calibration needs no optimizer, and none of the user's runs."""
        return None

    @override
    def on_fit_start(self) -> None:
        """Start a new calibration set."""
        self.calibration.batches.clear()
        self.calibration_done = False

    @override
    def on_train_start(self) -> None:
        """Refuse data that give no batches."""
        check_loader(self.trainer.train_dataloader, "train_dataloaders")

    @override
    def on_train_epoch_end(self) -> None:
        """One epoch is the whole calibration: stop after it, whatever ``max_epochs`` says."""
        self.trainer.should_stop = self.calibration_done = True

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Keep the calibration batch, under DDP those of all ranks; the first one also shows the model's structure."""
        if self.calibration_done:
            return
        start = len(self.calibration)
        with ranks.together(self.trainer.world_size > 1):
            batches = batches_of_all_ranks(batch)
        for each in [self.transfer_batch_to_device(each, self.device, 0) for each in batches]:
            self.calibration.append(each, self.inputs_of(each))
        self.latest_batches = range(start, len(self.calibration))
        if self.network.structure is None:
            with torch.no_grad():
                self.network.prepare(self._run_first_batch)

    def _run_first_batch(self) -> Any:
        with naming_batch(self.inputs_of(self.calibration.batches[0])):
            output = self.calibration.run(0)
        self._first_output = FirstOutput(output)
        return output

    def require_logits(self, divergence: Divergence | None = None) -> None:
        """Raise ``TypeError`` if the model's output for the first batch had no logits, which some stages compare, and
        ``ValueError`` if these are not those that a divergence is for."""
        if self._first_output is not None:
            self._first_output.require(divergence)

    @override
    def on_fit_end(self) -> None:
        """Raise if no batch came, warn if no stage ran; the data are needed no longer."""
        self.calibration.require()
        if not self.network.calibrated:
            rank_zero_warn(
                "fit has seen the calibration data, but nothing was quantized: give the Trainer stages, "
                "Trainer(callbacks=[Calibration(), AdaQuant()])."
            )
        self.calibration.batches.clear()

    def _evaluation_step(self, name: str, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module's step as the Trainer would: ``batch_idx`` only where the step takes it."""
        if self._validation_step is not None and name != "predict_step":
            return self._validation_step(self, batch, batch_idx, *args, **kwargs)
        step = getattr(self.model, name, None)
        if step is None:
            raise NotImplementedError(
                f"{type(self.model).__name__} has no {name}; pass validation_step= to QuantizationModule, or wrap a "
                "LightningModule that has one."
            )
        if not is_param_in_hook_signature(step, "batch_idx", min_args=2):
            args = (batch, *args)
        else:
            args = (batch, batch_idx, *args)
        with self._logging_through():
            return step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's ``validation_step``."""
        return self._evaluation_step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's ``test_step``."""
        return self._evaluation_step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's ``predict_step``; of a plain module, its output for the batch."""
        if not self._is_lightning:
            return self.calibration_step(args[0], args[1])
        return self._evaluation_step("predict_step", *args, **kwargs)

    @contextmanager
    def _logging_through(self) -> Iterator[None]:
        """Inside, ``self.log`` of the wrapped module is that of this one, which the Trainer knows."""
        if self._is_lightning:
            # Lightning hands its Trainer on to modules of its own package only.
            self.model.trainer = self._trainer  # type: ignore[assignment]
        self.model.log = self.log  # type: ignore[assignment]
        self.model.log_dict = self.log_dict  # type: ignore[assignment]
        try:
            yield
        finally:
            del self.model.log, self.model.log_dict

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> "QuantizationModule":
        """Load a quantized checkpoint; see ``LightningModule.load_from_checkpoint``.

        Args:
            checkpoint_path: The file.
            map_location: See there.
            hparams_file: See there.
            strict: See there.
            weights_only: Whether Python objects are refused, which could run any code; quantized checkpoints have none.
            **kwargs: ``model=`` is the float model, trained or not; others see there.

        Raises:
            ValueError: If the file is damaged, was changed, is none of a ``QuantizationModule``, or of another model.
        """
        if given := [name for name in field_names(QuantizationScheme) if kwargs.get(name) is not None]:
            raise TypeError(f"{given[0]} is given by the checkpoint, which has its formats: leave it out.")
        if weights_only:
            require_own(checkpoint_path)
        try:
            if "weights_only" in inspect.signature(super().load_from_checkpoint).parameters:
                kwargs["weights_only"] = weights_only
            elif weights_only:
                # Lightning before 2.6 would load Python objects.
                load_file(checkpoint_path, map_location="cpu", weights_only=True)
            loaded: QuantizationModule = super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, **kwargs
            )
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:
            if weights_only:
                require_readable(checkpoint_path, error)
            raise
        return loaded

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put packed integers and the quantization plan in the place of the quantized layers' weights."""
        if not self.network.calibrated:
            rank_zero_warn("The module is not calibrated yet: the checkpoint holds the float model, run Calibration.")
        checkpoint[CHECKPOINT_KEY] = pack_network(self.network, checkpoint["state_dict"], _PREFIX)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Apply the checkpoint's plan to the model, before Lightning loads the state dict.

        Raises:
            ValueError: If the checkpoint is not of a QuantizationModule, of another model, or damaged.
        """
        if CHECKPOINT_KEY not in checkpoint:
            raise ValueError(NOT_OURS.format(path="This checkpoint"))
        try:
            unpack_network(self.network, checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"], _PREFIX)
        except (LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            raise ValueError(
                f"The checkpoint is damaged or was changed ({describe_error(error)}): take another copy of it, "
                "or write it anew from the quantized model."
            ) from error


for _loop in ("validation", "test", "predict"):
    for _when in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end"):
        setattr(QuantizationModule, f"on_{_loop}_{_when}", _delegated(f"on_{_loop}_{_when}"))
