"""A model with quantized layers: preparing it, switching it, saving and rebuilding it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .folding import Fold, apply_fold, fold_batch_norm
from .layers import QuantizedLayer, layer_kind
from .observers import make_observer
from .ranges import check_range_method
from .scheme import Bits, QuantizationScheme
from .structure import Structure, observe_structure

log = logging.getLogger(__name__)

CONFIG_VERSION = 1


@dataclass(frozen=True)
class LayerSummary:
    """One line of ``QuantizedNetwork.summary``: ``kind`` is ``"quantized"``, ``"folded"`` or ``"float"``."""

    name: str
    type: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    parameters: int
    note: str


class QuantizedNetwork:
    """The quantized layers of a model, and what is known of its structure.

    The model is changed in place: pass a copy if the original is still needed. ``prepare`` does all that needs a batch.

    Args:
        model: Any module, in eval mode.
        scheme: Widths and formats.

    Raises:
        ValueError: If the model is quantized already, has no quantizable layer, or an override matches none.
    """

    def __init__(self, model: nn.Module, scheme: QuantizationScheme) -> None:
        self.model, self.scheme = model, scheme
        candidates: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if hasattr(module, "input_quantizer"):
                raise ValueError(f"The model is already quantized (layer {name!r}); quantize the float model instead.")
            if layer_kind(module) is not None:
                candidates[name] = module
        if not candidates:
            raise ValueError(f"{type(model).__name__} has no quantizable layer; add its types with register_layer().")
        scheme.check_overrides(list(candidates))
        self.float_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        self.layers: dict[str, QuantizedLayer] = {}
        self.folds: list[Fold] = []
        self.floats: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.fixed: set[str] = set()
        self.structure: Structure | None = None
        self._candidates = list(candidates)

    @property
    def prepared(self) -> bool:
        """Whether BatchNorms are folded and quantizers attached."""
        return bool(self.layers)

    def prepare(self, run: Callable[[], Any]) -> None:
        """Observe the structure on one batch; the first time also fold BatchNorms and attach (disabled) quantizers.

        Args:
            run: Calls the model on one batch.
        """
        if not self.prepared:
            self._bake_parametrizations()
            structure = observe_structure(self.model, run)
            self.folds, self.left = fold_batch_norm(self.model, structure, run)
            self._attach(list(structure.calls_of))
            for name, reason in self.left.items():
                log.warning("BatchNorm %s is not folded: %s.", name, reason)
        with self.quantized(False):
            self.structure = observe_structure(self.model, run)

    def _bake_parametrizations(self) -> None:
        """Make parametrized weights (weight norm, spectral norm) plain: their value in eval mode does not change any
        more."""
        for name in self._candidates:
            module = self.model.get_submodule(name)
            for tensor in list(getattr(module, "parametrizations", {})):
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)

    def _attach(self, order: list[str]) -> None:
        running = [name for name in order if name in self._candidates]
        edges = {running[0], running[-1]} if running else set()
        for name in sorted(self._candidates, key=lambda n: running.index(n) if n in running else len(running)):
            module = self.model.get_submodule(name)
            bits = self.scheme.bits_for(name, name in edges)
            if bits is None:
                self.floats[name] = "left float by an override"
            elif not isinstance(module._parameters.get("weight"), nn.Parameter):
                self.leave_float(name, "its weight is not a plain parameter")
            else:
                self._attach_layer(name, bits)
                if self.scheme.override_for(name)[0] or (name in edges and self.scheme.edge_bits is not None):
                    self.fixed.add(name)

    def _attach_layer(self, name: str, bits: Bits) -> None:
        scheme = self.scheme
        module = self.model.get_submodule(name)
        self.layers[name] = QuantizedLayer.attach(
            name, module, bits, scheme.symmetric, scheme.per_channel, scheme.activation_symmetric
        )

    def leave_float(self, name: str, reason: str) -> None:
        """Take a layer out of quantization, for a reason that the summary gives; warns, for it was meant to be
        quantized."""
        if name in self.layers:
            self.layers.pop(name).detach()
        self.floats[name] = reason
        log.warning("Layer %s stays float: %s.", name, reason)

    @property
    def free_layers(self) -> list[str]:
        """Quantized layers whose width neither ``edge_bits`` nor an override fixes, in the order of execution."""
        return [name for name in self.layers if name not in self.fixed]

    @property
    def quantizable_parameters(self) -> int:
        """Weights of all layers that could be quantized, whether they are or not."""
        floats = [self.model.get_submodule(name) for name in self.floats]
        left = sum(layer.weight.numel() for layer in floats if isinstance(layer.weight, Tensor))
        return left + sum(layer.weight.numel() for layer in self.layers.values())

    @property
    def weight_bits_total(self) -> int:
        """Bits of the weights of all quantizable layers: 32 for each weight left float."""
        quantized = sum(layer.weight.numel() for layer in self.layers.values())
        bits = sum(layer.weight.numel() * layer.bits[0] for layer in self.layers.values())
        return bits + 32 * (self.quantizable_parameters - quantized)

    @property
    def calibrated(self) -> bool:
        """Whether the quantizers are at work."""
        return self.prepared and any(layer.input_quantizer.enabled for layer in self.layers.values())

    def watch(self, observer: str, weight_observer: str, momentum: float, percentile: float, p: float) -> None:
        """Give each layer a fresh observer of its input, and the way its weight's range is chosen."""
        check_range_method(weight_observer, "weight_observer")
        for layer in self.layers.values():
            layer.input_quantizer.observer = make_observer(observer, momentum, percentile, p).to(layer.weight.device)
            layer.range_methods = {"method": weight_observer, "percentile": percentile, "p": p}

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Inside, observers watch what passes, and the model computes in float."""
        with self.quantized(False):
            for layer in self.layers.values():
                layer.input_quantizer.observing = True
            try:
                yield
            finally:
                for layer in self.layers.values():
                    layer.input_quantizer.observing = False

    def fit_ranges(self) -> None:
        """Choose all ranges from what was observed and switch quantization on; layers that never ran stay float, with a
        warning.

        Raises:
            RuntimeError: If no layer was reached at all.
        """
        unreached = []
        for name, layer in self.layers.items():
            observer = layer.input_quantizer.observer
            if observer is None or not observer.seen:
                unreached.append(name)
        if len(unreached) == len(self.layers):
            raise RuntimeError("No calibration batch has reached any quantizable layer; check calibration_step().")
        for name in unreached:
            self.leave_float(name, "no calibration batch has reached it")
        for layer in self.layers.values():
            layer.variants.clear()
            layer.fit_ranges(layer.bits)
            layer.set_enabled(True)

    @contextmanager
    def quantized(self, enabled: bool) -> Iterator[None]:
        """Inside, the model computes quantized, or as the float model it was made from (BatchNorms folded)."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                if enabled:
                    was = layer.input_quantizer.enabled
                    stack.callback(layer.set_enabled, was)
                    layer.set_enabled(True)
                else:
                    stack.enter_context(layer.as_float())
            yield

    def summary(self) -> list[LayerSummary]:
        """What has become of each layer and each BatchNorm, in the order of execution."""
        order = list(self.structure.calls_of) if self.structure else []
        folded = {fold.normalization: f"into {fold.layer}" for fold in self.folds}
        lines = []
        for name, module in self.model.named_modules():
            if name in self.layers:
                layer = self.layers[name]
                lines.append(self._line(name, "quantized", layer.weight.numel(), "", layer.bits))
            elif name in folded:
                lines.append(self._line(name, "folded", 0, folded[name]))
            elif name in self.floats or name in self.left:
                count = sum(p.numel() for p in module.parameters(recurse=False))
                lines.append(self._line(name, "float", count, self.floats.get(name) or self.left[name]))
            elif not self.prepared and layer_kind(module) is not None:
                lines.append(self._line(name, "float", module.weight.numel(), "not calibrated yet"))
        return sorted(lines, key=lambda line: order.index(line.name) if line.name in order else len(order))

    def _line(self, name: str, kind: str, parameters: int, note: str, bits: Bits | None = None) -> LayerSummary:
        module = self.model.get_submodule(name)
        cls = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
        weight_bits, activation_bits = bits or (None, None)
        return LayerSummary(name, cls.__name__, kind, weight_bits, activation_bits, parameters, note)

    def to_config(self) -> dict[str, Any]:
        """Plain values from which ``load_config`` makes the same quantized structure on another copy of the float
        model."""
        return {
            "version": CONFIG_VERSION,
            "scheme": self.scheme.to_dict(),
            "folds": [[fold.layer, fold.normalization] for fold in self.folds],
            "layers": {name: list(layer.bits) for name, layer in self.layers.items()},
            "fixed": sorted(self.fixed),
            "floats": dict(self.floats),
            "left": dict(self.left),
            "calibrated": self.calibrated,
        }

    def load_config(self, config: dict[str, Any]) -> None:
        """Fold and attach as ``config`` says, or check that it has been done; ranges and weights are for the caller to
        load.

        Raises:
            ValueError: If the configuration is of another version, or of another model.
        """
        if config.get("version") != CONFIG_VERSION:
            raise ValueError(
                f"The checkpoint's quantization config has version {config.get('version')!r}, this is version "
                f"{CONFIG_VERSION}; load it with the release that wrote it."
            )
        if not self.prepared:
            self._rebuild(config)
        elif list(config["layers"]) != list(self.layers) or config["folds"] != self.to_config()["folds"]:
            raise ValueError(
                "The model is already quantized, with other layers than the checkpoint's; load the checkpoint into a "
                "QuantizationModule made anew from the float model."
            )
        self.scheme = QuantizationScheme(**config["scheme"])
        for name, (weight_bits, activation_bits) in config["layers"].items():
            on_weight, on_input = self.layers[name].quantizers
            on_weight.bits, on_input.bits = weight_bits, activation_bits
            self.layers[name].set_enabled(config["calibrated"])
        self.fixed = set(config["fixed"])
        self.floats, self.left = dict(config["floats"]), dict(config["left"])

    def _rebuild(self, config: dict[str, Any]) -> None:
        names = {name for name, _ in self.model.named_modules()}
        wanted = {*config["layers"], *(name for pair in config["folds"] for name in pair)}
        if missing := sorted(wanted - names):
            raise ValueError(f"The checkpoint is of another model: this one has no module {', '.join(missing[:5])}.")
        self._bake_parametrizations()
        self.scheme = QuantizationScheme(**config["scheme"])
        self.folds = [Fold(*pair) for pair in config["folds"]]
        for fold in self.folds:
            apply_fold(self.model, fold)
        for name, (weight_bits, activation_bits) in config["layers"].items():
            self._attach_layer(name, (weight_bits, activation_bits))
