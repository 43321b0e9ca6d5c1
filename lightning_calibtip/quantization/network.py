"""A model with quantized layers: preparing it, switching it, saving and rebuilding it."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attention import PRODUCTS, add_products, possible_products, route_attention
from .float_products import float_products
from .folding import Fold, apply_fold, fold_batch_norm
from .kinds import layer_kind, quantizable_layers
from .layers import QuantizedLayer
from .observers import make_observer
from .quantizer import Quantizer
from .ranges import check_range_method
from .scheme import Bits, QuantizationScheme
from .structure import Structure, observe_structure
from .summary import LayerSummary, summarize
from .tying import bake_parametrizations, own_parameter, untie

log = logging.getLogger(__name__)

CONFIG_VERSION = 2


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
        for module in model.modules():
            if isinstance(module, Quantizer):
                raise ValueError(f"The model is already quantized ({module.name}); quantize the float model instead.")
        self.has_attention = route_attention(model)
        self.candidates = list(quantizable_layers(model))
        if not self.candidates:
            raise ValueError(f"{type(model).__name__} has no quantizable layer; add its types with register_layer().")
        scheme.check_overrides([*self.candidates, *possible_products(model)])
        self.float_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        self.layers: dict[str, QuantizedLayer] = {}
        self.folds: list[Fold] = []
        self.floats: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.float_products: dict[str, str] = {}
        self.fixed: set[str] = set()
        self.notes: dict[str, str] = {}
        self.fingerprint = _fingerprint(model)
        self.knows_float = True
        self.structure: Structure | None = None
        self._tied: dict[str, str] = {}

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
            if self.has_attention:
                # The products of attention appear when it first runs.
                with torch.no_grad():
                    run()
                self.candidates = list(quantizable_layers(self.model))
                self.scheme.check_overrides(self.candidates)
            structure = observe_structure(self.model, run)
            self.folds, self.left = fold_batch_norm(self.model, structure, run)
            self._attach(list(structure.calls_of))
            for name, reason in self.left.items():
                log.warning("BatchNorm %s is not folded: %s.", name, reason)
            self.float_products = float_products(structure, [*self.layers, *self.floats])
            for name, reason in self.float_products.items():
                log.warning("%s %s: that stays float.", name or "The model itself", reason)
        with self._as_float():
            self.structure = observe_structure(self.model, run)

    def _make_plain(self) -> None:
        """Give each candidate plain parameters: no parametrizations, and nothing shared but embeddings' weights."""
        layers = {self.model.get_submodule(name): name for name in self.candidates}
        for layer in layers:
            bake_parametrizations(layer)
        copied, tied = untie(self.model, layers)
        self.notes = {layers[layer]: "with a copy of its own of a shared parameter" for layer in copied}
        self._tied = {layers[layer]: layers[owner] for layer, owner in tied.items()}

    def _attach(self, order: list[str]) -> None:
        running = [name for name in order if name in self.candidates]
        edges = {running[0], running[-1]} if running else set()
        widths = {name: self.scheme.bits_for(name, name in edges) for name in self.candidates}
        fixed = {name for name in self.candidates if self._is_fixed(name, edges)}
        for name, owner in list(self._tied.items()):
            if widths[name] is None or widths[owner] is None:
                own_parameter(self.model.get_submodule(name), "weight")
                self.notes[name] = "with a copy of its own of a shared parameter"
                del self._tied[name]
        for owner in set(self._tied.values()):
            self._agree([owner, *(name for name, other in self._tied.items() if other == owner)], widths, fixed)
        # Owners of tied weights first.
        for name in sorted(
            self.candidates, key=lambda n: (n in self._tied, running.index(n) if n in running else len(running))
        ):
            module, bits = self.model.get_submodule(name), widths[name]
            if bits is None:
                self.floats[name] = "left float by an override"
            elif hasattr(module, "weight") and not isinstance(module._parameters.get("weight"), nn.Parameter):
                self.leave_float(name, "its weight is not a plain parameter")
            else:
                self._attach_layer(name, bits)
        self.fixed = fixed & self.layers.keys()
        self._sort(running)

    def _is_fixed(self, name: str, edges: set[str]) -> bool:
        """Whether the user has said what width a layer has."""
        return self.scheme.override_for(name)[0] or (name in edges and self.scheme.edge_bits is not None)

    def _agree(self, layers: list[str], widths: dict[str, Bits | None], fixed: set[str]) -> None:
        """Give layers that share one weight one width of it: that of an override, or else of the first or last layer.

        Raises:
            ValueError: If overrides contradict each other.
        """
        wanted = {name: bits[0] for name in layers if (bits := widths[name]) is not None}
        overridden = {name: wanted[name] for name in layers if self.scheme.override_for(name)[0]}
        if len(set(overridden.values())) > 1:
            raise ValueError(f"overrides give one weight, which these layers share, several widths: {overridden}.")
        decisive = list(overridden) or [name for name in layers if name in fixed] or layers[:1]
        for name in layers:
            bits = widths[name]
            assert bits is not None
            widths[name] = wanted[decisive[0]], bits[1]
        if fixed & set(layers):
            fixed.update(layers)

    def _sort(self, order: list[str]) -> None:
        """Put the layers in the order of execution, those that do not run last."""
        position = {name: index for index, name in enumerate(order)}
        self.layers = dict(sorted(self.layers.items(), key=lambda item: position.get(item[0], len(order))))

    def _attach_layer(self, name: str, bits: Bits) -> None:
        module = self.model.get_submodule(name)
        owner = self._tied.get(name)
        parent = self.model.get_submodule(name.rpartition(".")[0])
        device = next((parameter.device for parameter in [*parent.parameters(), *self.model.parameters()]), None)
        tied_to = None if owner is None else self.layers[owner]
        self.layers[name] = QuantizedLayer.attach(name, module, bits, self.scheme, device, tied_to)

    def leave_float(self, name: str, reason: str) -> None:
        """Take a layer out of quantization, for a reason that the summary gives; warns, for it was meant to be
        quantized."""
        for other in [key for key, layer in self.layers.items() if layer.tied_to and layer.tied_to.name == name]:
            self.leave_float(other, f"its weight is that of {name}, which stays float")
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
        return sum(self.weights_of(name) for name in (*self.layers, *self.floats))

    def weights_of(self, name: str) -> int:
        """Number of weights of a quantizable layer; 0 if it has none of its own."""
        if name in self.layers:
            return self.layers[name].weight.numel()
        weight = getattr(self.model.get_submodule(name), "weight", None)
        return weight.numel() if isinstance(weight, Tensor) else 0

    @property
    def weight_bits_total(self) -> int:
        """Bits of the weights of all quantizable layers: 32 for each weight left float."""
        quantized = sum(layer.weight.numel() for layer in self.layers.values())
        bits = sum(layer.weight.numel() * layer.bits[0] for layer in self.layers.values())
        return bits + 32 * (self.quantizable_parameters - quantized)

    @property
    def calibrated(self) -> bool:
        """Whether the quantizers are at work."""
        return self.prepared and any(layer.enabled for layer in self.layers.values())

    def watch(self, observer: str, weight_observer: str, momentum: float, percentile: float, p: float) -> None:
        """Give each layer fresh observers of its inputs, and the way its weight's range is chosen."""
        check_range_method(weight_observer, "weight_observer")
        for layer in self.layers.values():
            for quantizer in layer.inputs:
                quantizer.observer = make_observer(observer, momentum, percentile, p).to(layer.device)
            layer.range_methods = {"method": weight_observer, "percentile": percentile, "p": p}

    @contextmanager
    def observing(self, tokens: Tensor | None = None) -> Iterator[None]:
        """Inside, observers watch what passes, and the model computes in float.

        Args:
            tokens: Which tokens of the batch count, bool, shape (batch, positions); all if None.
        """
        watching = [quantizer for layer in self.layers.values() for quantizer in layer.inputs]
        with self._as_float():
            for quantizer in watching:
                quantizer.observing, quantizer.tokens = True, tokens
            try:
                yield
            finally:
                for quantizer in watching:
                    quantizer.observing, quantizer.tokens = False, None

    def fit_ranges(self) -> None:
        """Choose all ranges from what was observed and switch quantization on; layers that never ran stay float, with a
        warning.

        Raises:
            RuntimeError: If no layer was reached at all.
        """
        runs = self.structure.calls_of if self.structure else {}
        reached = {name for name, layer in self.layers.items() if (layer.observed if layer.inputs else name in runs)}
        # The weight of one that does not run may be that of another, which does.
        owners = {layer.tied_to.name for name, layer in self.layers.items() if layer.tied_to and name in reached}
        unreached = [name for name in self.layers if name not in reached | owners]
        if not reached:
            raise RuntimeError("No calibration batch has reached any quantizable layer; check calibration_step().")
        for name in unreached:
            if name in self.layers:
                self.leave_float(name, "no calibration batch has reached it")
        for name, module in self.model.named_modules():
            if name.endswith(PRODUCTS) and layer_kind(module) and name not in (*self.layers, *self.floats):
                self.float_products[name] = "first ran after the first calibration batch"
                log.warning("%s %s: it stays float.", name, self.float_products[name])
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
        was = {name: layer.enabled for name, layer in self.layers.items()}
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
        """What has become of each layer, see ``summarize``."""
        return summarize(self)

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
            "float_products": dict(self.float_products),
            "tied": {name: layer.tied_to.name for name, layer in self.layers.items() if layer.tied_to},
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
        for name in ("symmetric", "per_channel", "activation_symmetric", "per_token"):
            if getattr(wanted, name) != getattr(self.scheme, name):
                raise ValueError(
                    f"The checkpoint has {name}={getattr(wanted, name)}, this quantized model "
                    f"{getattr(self.scheme, name)}; load it into a QuantizationModule made anew from the float model."
                )
        self.scheme = wanted
        self.knows_float = config["fingerprint"] == self.fingerprint
        self.notes = dict(config["notes"])
        for name, (weight_bits, activation_bits) in config["layers"].items():
            self.layers[name].set_bits((weight_bits, activation_bits))
            self.layers[name].set_enabled(config["calibrated"])
        self.fixed = set(config["fixed"])
        self.floats, self.left = dict(config["floats"]), dict(config["left"])
        self.float_products = dict(config["float_products"])

    def _rebuild(self, config: dict[str, Any]) -> None:
        self._add_products(config["layers"])
        names = {name for name, _ in self.model.named_modules()}
        wanted = {*config["layers"], *(name for pair in config["folds"] for name in pair)}
        if missing := sorted(wanted - names):
            raise ValueError(f"The checkpoint is of another model: this one has no module {', '.join(missing[:5])}.")
        self._make_plain()
        for name in self._tied.keys() - config["tied"].keys():
            own_parameter(self.model.get_submodule(name), "weight")
        if untied := sorted(name for name, owner in config["tied"].items() if self._tied.get(name) != owner):
            raise ValueError(
                f"The checkpoint has the weight of {', '.join(untied)} tied to an embedding's, this model has not: tie "
                "it (tie_word_embeddings) before loading."
            )
        self._tied = dict(config["tied"])
        self.scheme = QuantizationScheme(**config["scheme"])
        self.folds = [Fold(*pair) for pair in config["folds"]]
        for fold in self.folds:
            apply_fold(self.model, fold)
        for name in sorted(config["layers"], key=lambda name: name in self._tied):
            weight_bits, activation_bits = config["layers"][name]
            self._attach_layer(name, (weight_bits, activation_bits))
        self._sort(list(config["layers"]))

    def _add_products(self, layers: Iterable[str]) -> None:
        """Give attention modules the products among ``layers``, as running would."""
        modules = dict(self.model.named_modules())
        for parent, _, child in (name.rpartition(".") for name in layers):
            if child in PRODUCTS and parent in modules:
                add_products(modules[parent])


def _fingerprint(model: nn.Module) -> str:
    """Hash of all parameters and buffers, to know the float model again."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
