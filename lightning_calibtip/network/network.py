"""A model with quantized layers: observed, planned, applied; calibrated, switched, shown as the float model."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization.observers import make_observer
from ..quantization.quantizers import Quantizer
from ..quantization.ranges import RangeOptions
from ..quantization.spec import BitWidths, LayerConfig

# Each registers how its kind of modules is prepared.
from . import message_passing, multihead, recurrent  # noqa: F401
from .apply import apply
from .attention import PRODUCTS
from .fingerprint import fingerprint_of
from .layer_types import (
    layer_type_of,
    names_operations,
    names_products,
    quantizable_layers,
    require_full_precision,
)
from .layers import QuantizedLayer
from .observe import observe, record
from .plan import layer_config, plan, weights_of
from .preparations import preparations
from .product_parameters import possible_product_parameters
from .quantization_plan import QuantizationPlan
from .scheme import QuantizationScheme
from .structure import Structure
from .summary import LayerSummary, summarize, warn_of_float, warn_of_layers, warn_of_modules
from .tensors import ObservedTensor

log = logging.getLogger(__name__)


class QuantizedNetwork:
    """The quantized layers of a model, and what is known of its structure.

    The model is changed in place: pass a copy if the original is still needed. ``prepare`` does all that needs a batch.

    Args:
        model: Any module, in eval mode.
        scheme: Bit-widths and formats.

    Attributes:
        layers: The quantized layers by name, in the order of execution.
        structure: What one batch has shown of the float model with folded BatchNorms; None before ``prepare``.
        calibrated: Whether all quantizers have ranges.
        fingerprint: Digest of the float model.
        has_float_weights: Whether the float weights are those of the model that was quantized (not after a checkpoint
            was loaded into another one).

    Raises:
        ValueError: If the model is quantized already, has no quantizable layer, or an override matches none.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> network = QuantizedNetwork(model, QuantizationScheme(weight_bits=4, edge_bits=None))
        >>> batch = torch.tensor([[1.0, -1.0]])
        >>> network.prepare(lambda: model(batch))
        >>> network.attach_observers(RangeOptions("minmax"))
        >>> with network.observing():
        ...     _ = model(batch)
        >>> network.fit_ranges()
        >>> network.calibrated, [line.weight_bits for line in network.summary()]
        (True, [4, 4])
    """

    def __init__(self, model: nn.Module, scheme: QuantizationScheme) -> None:
        self.model, self.scheme = model, scheme
        for module in model.modules():
            if isinstance(module, Quantizer):
                raise ValueError(f"The model is already quantized ({module.name}); quantize the float model instead.")
        self.float_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        self.fingerprint = fingerprint_of(model)
        for preparation in preparations():
            preparation.prepare(model)
        candidates = quantizable_layers(model)
        require_full_precision(candidates)
        later = [name for preparation in preparations() for name in preparation.possible_names(model)]
        if not candidates and not later:
            raise ValueError(f"{type(model).__name__} has no quantizable layer; add its types with register_layer().")
        check_overrides(model, scheme)
        self.layers: dict[str, QuantizedLayer] = {}
        self.structure: Structure | None = None
        self.calibrated = False
        self.has_float_weights = True
        self._plan: QuantizationPlan | None = None
        # How many checkpoints have been loaded.
        self._loaded = 0

    @property
    def prepared(self) -> bool:
        """Whether BatchNorms are folded and quantizers attached."""
        return self._plan is not None

    @property
    def plan(self) -> QuantizationPlan:
        """What becomes of every module, with the present formats of the layers; before ``prepare``, nothing yet."""
        if self._plan is None:
            return QuantizationPlan.pending(self.model)
        return self._plan.with_configs({name: layer.config for name, layer in self.layers.items()})

    def prepare(self, run: Callable[[], Any]) -> None:
        """Observe one batch; the first time, plan and apply the plan.

        Args:
            run: Calls the model on one batch.
        """
        if not self.prepared:
            target = self.scheme.engine
            between_layers = target is not None and target.between_bits is not None
            decided = plan(self.model, observe(self.model, run, between_layers), self.scheme)
            warn_of_float(decided, self.scheme)
            self.apply(decided)
        with self._mode(quantized=False):
            self.structure = record(self.model, run)

    def apply(self, decided: QuantizationPlan) -> None:
        """Make the float model what a plan says.

        Raises:
            ValueError: If the plan is of another model.
        """
        self.layers = apply(self.model, decided)
        self._plan = decided

    def set_absorbers(self, absorbers: Mapping[ObservedTensor, str]) -> None:
        """Say which modules take in the ratios of equalized activations, see ``find_absorbers``."""
        assert self._plan is not None
        self._plan = self._plan.with_absorbers({name: tensor.name for tensor, name in absorbers.items()})

    def adopt(self, decided: QuantizationPlan) -> None:
        """Give a model that is quantized already the formats of another plan for the same layers.

        Raises:
            ValueError: If the plans differ in more than formats.
        """
        assert self._plan is not None
        for what, there, here in (
            ("layers", list(decided.layers), list(self.layers)),
            ("folded BatchNorms", decided.folds, self._plan.folds),
            ("tied weights", decided.tied, self._plan.tied),
            ("shared activations", decided.reads, self._plan.reads),
        ):
            if there != here:
                raise ValueError(
                    f"The model is already quantized, with other {what} than the checkpoint's; load the checkpoint "
                    "into a QuantizationModule made anew from the float model."
                )
        for name, planned in decided.layers.items():
            layer = self.layers[name]
            # What an earlier calibration and reconstruction have left belongs to another state.
            layer.variants.clear()
            layer.errors = None
            for tensor in (*layer.tensors, layer.output_tensor):
                tensor.observer, tensor.learnable = None, None
            assert planned.config is not None
            layer.install(planned.config)
        self._plan = decided

    def config_for(self, name: str, bit_widths: BitWidths) -> LayerConfig:
        """Format that a quantized layer has at given bit-widths."""
        config = layer_config(name, self.layers[name].type, bit_widths, self.scheme)
        assert self._plan is not None
        decided = self._plan.layers[name].config
        if decided and decided.output and config.output is None and bit_widths.activation is not None:
            # The plan has found that no quantizer reads the output.
            config = replace(config, output=decided.output)
        return config

    def switch(self, name: str, bit_widths: BitWidths) -> None:
        """Switch a layer to other bit-widths, see ``QuantizedLayer.switch``.

        Raises:
            RuntimeError: If that needs float weights, which a checkpoint has not brought along.
        """
        config = self.config_for(name, bit_widths)
        if config not in self.layers[name].variants:
            self._require_float_weights()
        self.layers[name].switch(config)

    def warn_of_equalization(self) -> None:
        """Say that other bit-widths end the equalization of inputs, if there is some."""
        if any(layer.input_ratio is not None for layer in self.layers.values()):
            log.warning("Inputs are equalized for their present bit-widths only: run Equalization after BitAllocation.")

    @property
    def searchable_layers(self) -> list[str]:
        """Quantized layers whose bit-widths are free to be chosen, in the order of execution."""
        return [] if self._plan is None else [name for name in self.layers if not self._plan.layers[name].pinned]

    @property
    def float_layers(self) -> dict[str, str]:
        """Layers of a quantizable type that stay in float, and why."""
        return {} if self._plan is None else self._plan.float_layers

    def leave_float(self, name: str, reason: str) -> None:
        """Take a layer out of quantization, for a reason that the summary gives; warns, since it was meant to be
        quantized."""
        warn_of_layers(self._leave_float(name, reason))

    def _leave_float(self, name: str, reason: str) -> dict[str, str]:
        """The layers that are taken out, and why."""
        left: dict[str, str] = {}
        for other in [key for key, layer in self.layers.items() if layer.tied_to and layer.tied_to.name == name]:
            left |= self._leave_float(other, f"its weight is that of {name}, which stays float")
        if name in self.layers:
            layer = self.layers.pop(name)
            layer.detach()
            for tensor in dict.fromkeys(layer.tensors):
                tensor.readers.remove(name)
        assert self._plan is not None
        own = self.model.get_submodule(name).parameters(recurse=False)
        self._plan = self._plan.with_float_layer(name, reason, sum(parameter.numel() for parameter in own))
        return {**left, name: reason}

    @property
    def quantizers(self) -> list[Quantizer]:
        """All quantizers that the layers have at present; one that several layers share counts once."""
        return list(dict.fromkeys(quantizer for layer in self.layers.values() for quantizer in layer.quantizers))

    @property
    def tensors(self) -> list[ObservedTensor]:
        """All activations that the layers read or write."""
        found = (tensor for layer in self.layers.values() for tensor in (*layer.tensors, layer.output_tensor))
        return list(dict.fromkeys(found))

    def weights_of(self, name: str) -> int:
        """Number of weights of a quantizable layer; 0 if it has none of its own."""
        if name in self.layers:
            return self.layers[name].weight.numel()
        return weights_of(self.model.get_submodule(name))

    def attach_observers(self, options: RangeOptions) -> None:
        """Give each activation a fresh observer, and each layer the way its weight's range is chosen."""
        for layer in self.layers.values():
            layer.range_options = options
            for tensor in (*layer.tensors, layer.output_tensor):
                tensor.observer = None
        for layer in self.layers.values():
            outputs = [layer.output_tensor] if layer.config.output is not None else []
            for tensor in [*layer.tensors, *outputs]:
                tensor.observer = tensor.observer or make_observer(options).to(layer.device)

    @contextmanager
    def observing(self, tokens: Tensor | None = None) -> Iterator[None]:
        """Inside, observers see what passes, and the model computes in float.

        Args:
            tokens: Which tokens of the batch count, bool, shape (batch, positions); all if None.
        """
        with ExitStack() as stack:
            stack.enter_context(self._mode(quantized=False))
            for tensor in self.tensors:
                tensor.next_batch()
            for layer in self.layers.values():
                stack.enter_context(layer.observing(tokens))
            yield

    def fit_ranges(self) -> None:
        """Choose all ranges from what was observed and switch quantization on; layers that never ran stay float, with a
        warning.

        Raises:
            RuntimeError: If no layer was reached at all.
        """
        runs = self.structure.calls_of if self.structure else {}
        reached = {name for name, layer in self.layers.items() if (layer.observed if layer.tensors else name in runs)}
        # The weight of one that does not run may be that of another, which does.
        owners = {layer.tied_to.name for name, layer in self.layers.items() if layer.tied_to and name in reached}
        unreached = [name for name in self.layers if name not in reached | owners]
        if not reached:
            raise RuntimeError("No calibration batch has reached any quantizable layer; check calibration_step().")
        left: dict[str, str] = {}
        for name in unreached:
            if name in self.layers:
                left |= self._leave_float(name, self._why_unreached(self.layers[name]))
        warn_of_layers(left)
        self._note_late_products()
        for layer in self.layers.values():
            layer.variants.clear()
            layer.errors = None
            layer.fit_ranges()
        self.calibrated = True
        self._set_mode(quantized=True)

    def _why_unreached(self, layer: QuantizedLayer) -> str:
        missing = [tensor.name for tensor in layer.tensors if not tensor.observed]
        if len(missing) == len(layer.tensors):
            return "no calibration batch has reached it"
        return f"no calibration batch has given it its {', '.join(missing)}; register its type with fewer operands"

    def _note_late_products(self) -> None:
        """List the products of attention that first ran after the plan was made."""
        assert self._plan is not None
        known, late = {*self.layers, *(module.name for module in self._plan.modules)}, {}
        for name, module in self.model.named_modules():
            if name.endswith(PRODUCTS) and layer_type_of(module) and name not in known:
                reason = "first ran after the first calibration batch"
                self._plan, late[name] = self._plan.with_float_matmul(name, type(module).__name__, reason), reason
        warn_of_modules(late)

    def reset_to_float(self) -> None:
        """Put all layers back to their float weights, with ranges alone, at their present bit-widths.

        Raises:
            RuntimeError: If there are none, since a checkpoint has not brought them along.
        """
        self._require_float_weights()
        for layer in self.layers.values():
            layer.reset()
        for tensor in self.tensors:
            tensor.learnable = None

    @contextmanager
    def quantized(self, enabled: bool) -> Iterator[None]:
        """Inside, the model computes quantized, or as the float model it was made from (BatchNorms folded).

        Raises:
            RuntimeError: If float is wanted, but the model that a checkpoint was loaded into had other weights; or if
                quantized is wanted before calibration.
        """
        if not enabled:
            self._require_float_weights()
        if enabled and not self.calibrated:
            raise RuntimeError("The model has no ranges yet, so it cannot compute quantized: run Calibration first.")
        with self._mode(enabled):
            yield

    def _require_float_weights(self) -> None:
        if not self.has_float_weights:
            raise RuntimeError(
                "The float weights are not in a quantized checkpoint, and the model it was loaded into is not the "
                "one that was quantized; pass the trained model to load_from_checkpoint(path, model=...)."
            )

    @contextmanager
    def _mode(self, quantized: bool) -> Iterator[None]:
        """Inside, all layers compute quantized, or all as float; afterwards as before."""
        was, loaded = {name: (layer.shows_float, layer.enabled) for name, layer in self.layers.items()}, self._loaded
        try:
            self._set_mode(quantized)
            yield
        finally:
            for name, layer in self.layers.items():
                # A checkpoint that was loaded meanwhile has decided otherwise.
                if name in was and loaded == self._loaded:
                    shows_float, enabled = was[name]
                    layer.show_float(shows_float)
                    layer.set_enabled(enabled)
            torch.clear_autocast_cache()

    def _set_mode(self, quantized: bool) -> None:
        for layer in self.layers.values():
            layer.show_float(not quantized)
            layer.set_enabled(quantized)
        # Autocast keeps casts of parameters, whose values have just changed.
        torch.clear_autocast_cache()

    def set_calibrated(self, calibrated: bool) -> None:
        """Say whether the quantizers have ranges, as a checkpoint that was loaded says; they are at work from then
        on."""
        self.calibrated = calibrated
        self._loaded += 1
        for layer in self.layers.values():
            layer.show_float(False)
            layer.set_enabled(calibrated)

    def summary(self) -> list[LayerSummary]:
        """Status of each layer, see ``summarize``."""
        return summarize(self.plan)


def check_overrides(model: nn.Module, scheme: QuantizationScheme) -> None:
    """Refuse overrides that match no layer that a model has, or may turn out to have when it runs.

    Raises:
        ValueError: If one matches none.

    Example:
        >>> check_overrides(nn.Sequential(nn.Linear(2, 2)), QuantizationScheme(overrides={"0": 4}))
    """
    # Only running shows which operations there are.
    engine = scheme.engine is not None
    products = [name for preparation in preparations() for name in preparation.possible_names(model)]
    knows = any(name.endswith(PRODUCTS) for name in products)
    later = [p for p in scheme.overrides or {} if names_products(p, knows) or (engine and names_operations(p))]
    known = {p: value for p, value in (scheme.overrides or {}).items() if p not in later}
    named = [*quantizable_layers(model), *products, *possible_product_parameters(model)]
    replace(scheme, overrides=known).check_overrides(named)
