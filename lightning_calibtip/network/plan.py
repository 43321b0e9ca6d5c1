"""Planning: decide what becomes of every module of one model."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..quantization.spec import BitWidths, LayerConfig
from .between import grid_root, integer_operations, unquantized_outputs
from .dataflow import shared_operands
from .float_matmuls import find_float_matmuls
from .layer_types import LayerType, layer_type_of, quantizable_layers
from .preparations import float_part
from .product_weights import ProductWeight
from .quantization_plan import ModulePlan, QuantizationPlan, class_name
from .scheme import QuantizationScheme
from .structure import Structure, Value
from .tensors import activation_name
from .tying import Ties, find_ties

# Why a layer stays in float that has no tensor of the kinds that the scheme quantizes.
NOTHING_QUANTIZED = "none of its tensors is quantized at these bit-widths"

# What engines compute in integers only if they write integers.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_COPIED = "with a copy of its own of a shared parameter"


def plan(model: nn.Module, structure: Structure, scheme: QuantizationScheme) -> QuantizationPlan:
    """Decide what becomes of every module; nothing is changed, and nothing is run.

    Args:
        model: The float model.
        structure: What ``observe`` has seen of it, with the BatchNorms that it has proved to be foldable.
        scheme: Bit-widths and formats that the user asks for.

    Raises:
        ValueError: If an override matches no layer, overrides give one weight, which layers share, several bit-widths,
            or a layer would stay float that the scheme's target does not run in float.

    Example:
        >>> from lightning_calibtip.network.observe import observe
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> structure = observe(model, lambda: model(torch.ones(1, 2)))
        >>> decided = plan(model, structure, QuantizationScheme(weight_bits=4, overrides={"2": None}))
        >>> [(module.name, module.config and module.config.bit_widths.label) for module in decided.modules]
        [('0', 'W8A8'), ('2', None)]
        >>> QuantizationPlan.from_dict(decided.to_dict()) == decided
        True
    """
    return _Planner(model, structure, scheme).plan()


class _Planner:
    """The decisions of one plan, each derived from those before."""

    def __init__(self, model: nn.Module, structure: Structure, scheme: QuantizationScheme) -> None:
        self.model, self.structure, self.scheme = model, structure, scheme
        self.layers = quantizable_layers(model)
        scheme.check_overrides(list(self.layers))
        operations = [name for name in structure.calls_of if self._is_operation(name)]
        running = [name for name in structure.calls_of if name in self.layers and name not in operations]
        edges = self._edges(running)
        self.bit_widths = {
            name: scheme.operation_bit_widths(name) if name in operations else scheme.bit_widths_of(name, name in edges)
            for name in self.layers
        }
        pins_edges = scheme.edge_bits is not None
        self.pinned = {name for name in self.layers if scheme.is_overridden(name) or (name in edges and pins_edges)}
        self.pinned |= set(operations)
        self.ties = self._agreed_ties()
        self.configs = {name: self._config(name) for name in self.layers}
        self.float_layers = {name: reason for name in self.layers if (reason := self._why_float(name))}
        self._decide_between_layers(operations)

    def _edges(self, running: list[str]) -> set[str]:
        """The first and the last of the layers that run. Where one is a weight or an input of the module that holds it,
        the first (or last) of the other kind inside of that module belongs to it."""
        edges = set(running[:1] + running[-1:])
        for name in [name for name in edges if self._type(name).part]:
            owner = name.rpartition(".")[0]
            others = [other for other in running if not owner or other.startswith(f"{owner}.")]
            kinds = [
                other for other in others if (self._type(other).weight is None) != (self._type(name).weight is None)
            ]
            edges.update(kinds[:1] if name == running[0] else kinds[-1:])
        return edges

    def _is_operation(self, name: str) -> bool:
        return name in self.layers and self._type(name).between_layers

    def _type(self, name: str) -> LayerType:
        layer_type = layer_type_of(self.layers[name])
        assert layer_type is not None
        return layer_type

    def _decide_between_layers(self, operations: list[str]) -> None:
        """Leave out the operations that an engine would compute in float, and give convolutions whose output no
        quantizer reads one of their own."""
        target = self.scheme.engine
        if target is not None and not target.float_layers and self.float_layers:
            name, reason = next(iter(self.float_layers.items()))
            raise ValueError(
                f"Layer {name} would stay float ({reason}), and target={target.name!r} runs no float layers: quantize "
                "it, or take another target."
            )
        if target is None or target.between_bits is None:
            return
        operands = {
            name: len(config.inputs)
            for name, config in self.configs.items()
            if name not in self.float_layers and config.inputs and None not in config.inputs
        }
        folds = {fold.normalization: fold.layer for fold in self.structure.folds}
        wanted = [name for name in operations if name in operands]
        chosen = integer_operations(self.structure, wanted, operands, folds)
        for name in [name for name in self.layers if self._is_operation(name) and name not in chosen]:
            for decided in (self.layers, self.configs, self.bit_widths, self.float_layers, operands):
                decided.pop(name, None)
        convolutions = [name for name in operands if isinstance(self.layers[name], _CONVOLUTIONS)]
        reads = self._reads()
        grids = {name: tuple(zip(reads[name], self.configs[name].inputs, strict=True)) for name in operands}
        for name in unquantized_outputs(self.structure, convolutions, operands, folds, grids):
            config = self.configs[name]
            assert config.inputs[0] is not None
            output = target.activation(replace(config.inputs[0], bits=target.between_bits))
            self.configs[name] = replace(config, output=output)

    def plan(self) -> QuantizationPlan:
        matmuls = find_float_matmuls(self.structure, list(self.layers))
        reads = self._reads()
        folds = {fold.normalization: fold.layer for fold in self.structure.folds}
        found = []
        for name, module in self.model.named_modules():
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            described = ModulePlan(name, class_name(module), "module", own)
            if name in self.layers:
                found.append(self._layer(described, module, reads))
            elif name in folds:
                found.append(replace(described, role="normalization", parameters=0, folded_into=folds[name]))
            elif name in self.structure.unfolded_norms:
                found.append(replace(described, role="normalization", reason=self.structure.unfolded_norms[name]))
            elif name in matmuls:
                found.append(replace(described, role="matmul", reason=matmuls[name]))
            elif reason := float_part(module):
                found.append(replace(described, reason=reason))
            elif own and ".parametrizations." not in f".{name}.":
                found.append(replace(described, reason="not a quantizable type of layer"))
        order = {name: position for position, name in enumerate(self.structure.calls_of)}
        return QuantizationPlan(tuple(sorted(found, key=lambda module: order.get(module.name, len(order)))))

    def _layer(self, described: ModulePlan, module: nn.Module, reads: Mapping[str, tuple[str, ...]]) -> ModulePlan:
        name = described.name
        copies = self.ties.copies.get(name, ())
        note = _COPIED if copies else ""
        sums_over = module.sums_over if isinstance(module, ProductWeight) else None
        if name in self.float_layers:
            reason = self.float_layers[name]
            return replace(described, role="layer", reason=reason, copies=copies, sums_over=sums_over)
        tied_to = self.ties.tied.get(name)
        return replace(
            described,
            role="layer",
            parameters=0 if tied_to else weights_of(module),
            config=self.configs[name],
            reason=f"with the weight of {tied_to}" if tied_to else note,
            tied_to=tied_to,
            copies=copies,
            reads=reads[name],
            pinned=name in self.pinned,
            used_by=self.structure.led_layers.get(name),
            sums_over=sums_over,
        )

    def _agreed_ties(self) -> Ties:
        """Ties between layers that can share a weight, whose bit-widths of it are made one; the others get copies."""
        ties = find_ties(self.model, self.layers)
        copies, tied = dict(ties.copies), dict(ties.tied)
        for name, owner in ties.tied.items():
            in_float = {self.bit_widths[layer].weight is None for layer in (name, owner)}
            if len(in_float) > 1 or any(self._config(layer).is_float for layer in (name, owner)):
                copies[name] = (*copies.get(name, ()), self._weight_name(name))
                del tied[name]
        for owner in set(tied.values()):
            self._agree([owner, *(name for name, other in tied.items() if other == owner)])
        for name, owner in list(tied.items()):
            # A target may want formats that one weight cannot have at once.
            if self._config(name).weight != self._config(owner).weight:
                copies[name] = (*copies.get(name, ()), self._weight_name(name))
                del tied[name]
        return Ties(copies, tied)

    def _weight_name(self, name: str) -> str:
        layer_type = layer_type_of(self.layers[name])
        return (layer_type and layer_type.weight) or "weight"

    def _agree(self, layers: list[str]) -> None:
        """Give layers that share one weight one bit-width of it: that of an override, or else of the first or last
        layer.

        Raises:
            ValueError: If overrides contradict each other.
        """
        wanted = {name: self.bit_widths[name].weight for name in layers}
        overridden = {name: wanted[name] for name in layers if self.scheme.is_overridden(name)}
        if len(set(overridden.values())) > 1:
            raise ValueError(f"overrides give one weight, which these layers share, several bit-widths: {overridden}.")
        decisive = list(overridden) or [name for name in layers if name in self.pinned] or layers[:1]
        for name in layers:
            self.bit_widths[name] = BitWidths(wanted[decisive[0]], self.bit_widths[name].activation)
        if self.pinned & set(layers):
            self.pinned.update(layers)

    def _config(self, name: str) -> LayerConfig:
        return layer_config(name, self._type(name), self.bit_widths[name], self.scheme)

    def _why_float(self, name: str) -> str:
        module, layer_type = self.layers[name], self._type(name)
        if self.configs[name].is_float:
            if self.scheme.is_overridden(name):
                return "left float by an override"
            return NOTHING_QUANTIZED
        user = self.structure.weight_taken_by(name)
        # The weight of one that does not run may be that of another layer, which does.
        if user is not None and user not in self.layers:
            taken = f"by module {user}" if user else "by the model itself"
            return f"its weight is multiplied {taken}, and not by the layer's own forward"
        weight = layer_type.weight
        if weight is None or parametrize.is_parametrized(module, weight):
            return ""
        is_plain = isinstance(module._parameters.get(weight), nn.Parameter)
        return "" if is_plain or not hasattr(module, weight) else "its weight is not a plain parameter"

    def _identity(self, value: Value) -> Value:
        """The tensor that one is a part or a view of, where engines go on with its grid."""
        target = self.scheme.engine
        return value if target is None or target.between_bits is None else grid_root(self.structure, value)

    def _reads(self) -> dict[str, tuple[str, ...]]:
        """Names of the activations that each quantized layer reads, where those that several layers read have one."""
        types = {name: layer_type_of(self.layers[name]) for name in self.layers if name not in self.float_layers}
        operands = {name: layer_type.operands for name, layer_type in types.items() if layer_type is not None}
        places = [(name, i) for name, of_layer in operands.items() for i in range(len(of_layer))]
        names = {place: activation_name(*place) for place in places}
        counts = {name: len(of_layer) for name, of_layer in operands.items()}
        for group in shared_operands(self.structure, counts, self._identity):
            # Operations between layers see whatever the layers see.
            layers = [(name, i) for name, i in group if not self._is_operation(name)]
            first = {operands[name][i].token_axes: (name, i) for name, i in reversed(layers)}
            for name, i in group:
                names[name, i] = activation_name(*first.get(operands[name][i].token_axes, (layers or group)[0]))
        return {name: tuple(names[name, i] for i in range(len(of_layer))) for name, of_layer in operands.items()}


def layer_config(name: str, layer_type: LayerType, bit_widths: BitWidths, scheme: QuantizationScheme) -> LayerConfig:
    """Format of a layer at given bit-widths, by the user's scheme and its target.

    Example:
        >>> from lightning_calibtip.network.layer_types import LayerType
        >>> layer_config("fc", LayerType(), BitWidths(4, None), QuantizationScheme()).inputs
        (None,)
    """
    config, target = scheme.config(layer_type, bit_widths), scheme.engine
    return config if target is None else target.config(name, layer_type, config)


def weights_of(layer: nn.Module) -> int:
    """Number of weights of a layer of a quantizable type; 0 if it has none.

    Example:
        >>> weights_of(nn.Linear(2, 3))
        6
    """
    layer_type = layer_type_of(layer)
    weight = getattr(layer, (layer_type and layer_type.weight) or "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else 0
