"""A model with quantized layers: preparing it, switching it, saving and rebuilding it."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .folding import Fold, apply_fold, fold_batch_norm
from .layers import QuantizedLayer, bake_parametrizations, quantizable_layers, untie
from .observers import make_observer
from .ranges import check_range_method
from .scheme import Bits, QuantizationScheme
from .structure import Structure, observe_structure

log = logging.getLogger(__name__)

CONFIG_VERSION = 1

# What quantization itself adds to a layer.
_OWN_MODULES = (".input_quantizer", ".parametrizations.weight", ".parametrizations.weight.0")


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
        for name, module in model.named_modules():
            if hasattr(module, "input_quantizer"):
                raise ValueError(f"The model is already quantized (layer {name!r}); quantize the float model instead.")
        candidates = quantizable_layers(model)
        if not candidates:
            raise ValueError(f"{type(model).__name__} has no quantizable layer; add its types with register_layer().")
        scheme.check_overrides(list(candidates))
        self.float_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        self.layers: dict[str, QuantizedLayer] = {}
        self.folds: list[Fold] = []
        self.floats: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.fixed: set[str] = set()
        self.notes: dict[str, str] = {}
        self.fingerprint = _fingerprint(model)
        self.knows_float = True
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
            self._make_plain()
            structure = observe_structure(self.model, run)
            self.folds, self.left = fold_batch_norm(self.model, structure, run)
            self._attach(list(structure.calls_of))
            for name, reason in self.left.items():
                log.warning("BatchNorm %s is not folded: %s.", name, reason)
        with self._as_float():
            self.structure = observe_structure(self.model, run)

    def _make_plain(self) -> None:
        """Give each candidate plain parameters of its own: no parametrizations, nothing shared."""
        layers = {self.model.get_submodule(name): name for name in self._candidates}
        for layer in layers:
            bake_parametrizations(layer)
        self.notes = {
            layers[layer]: "with a copy of its own of a shared parameter" for layer in untie(self.model, layers)
        }

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
        with self._as_float():
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
            layer.errors = None
            layer.fit_ranges(layer.bits)
            layer.set_enabled(True)

    def start_over(self) -> None:
        """Put all layers back to their float weights, with ranges alone at their present widths."""
        for layer in self.layers.values():
            layer.variants.clear()
            layer.take(layer.bits)

    @contextmanager
    def quantized(self, enabled: bool) -> Iterator[None]:
        """Inside, the model computes quantized, or as the float model it was made from (BatchNorms folded).

        Raises:
            RuntimeError: If float is wanted, but the model that a checkpoint was loaded into had other weights; or if
                quantized is wanted before calibration.
        """
        if not enabled:
            if not self.knows_float:
                raise RuntimeError(
                    "The float weights are not in a quantized checkpoint, and the model it was loaded into is not the "
                    "one that was quantized; pass the trained model to load_from_checkpoint(path, model=...)."
                )
            with self._as_float():
                yield
            return
        if not self.calibrated:
            raise RuntimeError("The model has no ranges yet, so it cannot compute quantized: run Calibration first.")
        was = {name: layer.input_quantizer.enabled for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.set_enabled(True)
            yield
        finally:
            for name, layer in self.layers.items():
                layer.set_enabled(was[name])

    @contextmanager
    def _as_float(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self.layers.values():
                stack.enter_context(layer.as_float())
            yield

    def summary(self) -> list[LayerSummary]:
        """What has become of each layer and each BatchNorm, in the order of execution."""
        order = list(self.structure.calls_of) if self.structure else []
        folded = {fold.normalization: f"into {fold.layer}" for fold in self.folds}
        lines = []
        for name, module in self.model.named_modules():
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            if name in self.layers:
                layer = self.layers[name]
                lines.append(self._line(name, "quantized", layer.weight.numel(), self.notes.get(name, ""), layer.bits))
            elif name in folded:
                lines.append(self._line(name, "folded", 0, folded[name]))
            elif name in self.floats or name in self.left:
                lines.append(self._line(name, "float", own, self.floats.get(name) or self.left[name]))
            elif own and not name.endswith(_OWN_MODULES):
                waiting = name in self._candidates and not self.prepared
                note = "not calibrated yet" if waiting else "not a quantizable type of layer"
                lines.append(self._line(name, "float", own, note))
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
            "notes": dict(self.notes),
            "calibrated": self.calibrated,
            "fingerprint": self.fingerprint,
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
        wanted = QuantizationScheme(**config["scheme"])
        for name in ("symmetric", "per_channel", "activation_symmetric"):
            if getattr(wanted, name) != getattr(self.scheme, name):
                raise ValueError(
                    f"The checkpoint has {name}={getattr(wanted, name)}, this quantized model "
                    f"{getattr(self.scheme, name)}; load it into a QuantizationModule made anew from the float model."
                )
        self.scheme = wanted
        self.knows_float = config["fingerprint"] == self.fingerprint
        self.notes = dict(config["notes"])
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
        self._make_plain()
        self.scheme = QuantizationScheme(**config["scheme"])
        self.folds = [Fold(*pair) for pair in config["folds"]]
        for fold in self.folds:
            apply_fold(self.model, fold)
        for name, (weight_bits, activation_bits) in config["layers"].items():
            self._attach_layer(name, (weight_bits, activation_bits))


def _fingerprint(model: nn.Module) -> str:
    """Hash of all parameters and buffers, to know the float model again."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
