"""Reading checkpoints whose configuration has version 2: no plan yet, but lists of what became of the layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..quantization.spec import BitWidths
from .attention import PRODUCTS, make_product
from .layer_types import layer_type_of, quantizable_layers
from .plan import weights_of
from .quantization_plan import ModulePlan, QuantizationPlan
from .scheme import QuantizationScheme
from .tensors import activation_name
from .tying import find_ties

# Names of the inputs' quantizers then and now.
_INPUT_QUANTIZERS = {"input_quantizer.": "input_quantizers.0.", "second_input_quantizer.": "input_quantizers.1."}


def read_version_2(model: nn.Module, config: Mapping[str, Any]) -> tuple[QuantizationPlan, QuantizationScheme]:
    """Plan and scheme of a configuration of version 2.

    Args:
        model: The float model, which is not changed.
        config: From the checkpoint.

    Raises:
        ValueError: If the configuration is of another model.

    Example:
        >>> config = {"scheme": {"weight_bits": 4}, "layers": {"0": [4, 8]}, "folds": [], "fixed": [], "floats": {},
        ...           "left": {}, "float_products": {}, "tied": {}, "notes": {}}
        >>> plan, scheme = read_version_2(nn.Sequential(nn.Linear(2, 2)), config)
        >>> plan.layers["0"].config.bit_widths.label
        'W4A8'
    """
    scheme = QuantizationScheme(**config["scheme"])
    modules = dict(model.named_modules())
    for name in config["layers"]:
        parent, _, child = name.rpartition(".")
        if child in PRODUCTS and parent in modules and name not in modules:
            # It appears when attention first runs, or when the plan is applied.
            modules[name] = make_product(child)
    wanted = {*config["layers"], *(name for pair in config["folds"] for name in pair)}
    if missing := sorted(wanted - modules.keys()):
        raise ValueError(f"The checkpoint is of another model: this one has no module {', '.join(missing[:5])}.")
    ties = find_ties(model, quantizable_layers(model))
    found = {name: _layer(name, modules[name], config, scheme, ties.copies, ties.tied) for name in config["layers"]}
    for layer, normalization in config["folds"]:
        found[normalization] = _module(normalization, modules, "normalization", folded_into=layer)
    for role, of_role in (("layer", "floats"), ("normalization", "left"), ("matmul", "float_products")):
        for name, reason in config[of_role].items():
            copies = ties.copies.get(name, ()) if role == "layer" else ()
            found[name] = replace(_module(name, modules, role, reason=reason), copies=copies)
    for name, module in modules.items():
        if name not in found and any(True for _ in module.parameters(recurse=False)):
            found[name] = _module(name, modules, "module", reason="not a quantizable type of layer")
    return QuantizationPlan(tuple(found.values())), scheme


def _layer(
    name: str,
    module: nn.Module,
    config: Mapping[str, Any],
    scheme: QuantizationScheme,
    copies: Mapping[str, tuple[str, ...]],
    tied: Mapping[str, str],
) -> ModulePlan:
    layer_type = layer_type_of(module)
    if layer_type is None:
        raise ValueError(
            f"The checkpoint is of another model: {name} is a {type(module).__name__} here, which is not a quantizable "
            "type; register a layer type of your own with register_layer() before loading."
        )
    weight_bits, activation_bits = config["layers"][name]
    owner = config["tied"].get(name)
    own_copies = copies.get(name, ())
    if owner is None and name in tied:
        own_copies = (*own_copies, layer_type.weight or "weight")
    return ModulePlan(
        name,
        type(module).__name__,
        "layer",
        0 if owner else weights_of(module),
        scheme.config(layer_type, BitWidths(weight_bits, activation_bits)),
        config["notes"].get(name, "") if owner is None else f"with the weight of {owner}",
        tied_to=owner,
        copies=own_copies,
        reads=tuple(activation_name(name, i) for i in range(len(layer_type.operands))),
        pinned=name in config["fixed"],
    )


def _module(
    name: str, modules: Mapping[str, nn.Module], role: str, reason: str = "", folded_into: str | None = None
) -> ModulePlan:
    module = modules.get(name)
    own = 0 if module is None or folded_into else sum(p.numel() for p in module.parameters(recurse=False))
    return ModulePlan(name, type(module).__name__, role, own, reason=reason, folded_into=folded_into)


def rename_version_2(state_dict: dict[str, Tensor], prefix: str, layers: Mapping[str, Any]) -> None:
    """Give the quantizers in a state dict of version 2 their present names, in place.

    Example:
        >>> state = {"model.fc.input_quantizer.scale": Tensor([1.0])}
        >>> rename_version_2(state, "model.", {"fc": [8, 8]})
        >>> list(state)
        ['model.fc.input_quantizers.0.scale']
    """
    for layer in layers:
        for old, new in _INPUT_QUANTIZERS.items():
            place = f"{prefix}{layer}.{old}"
            for key in [key for key in state_dict if key.startswith(place)]:
                state_dict[f"{prefix}{layer}.{new}{key.removeprefix(place)}"] = state_dict.pop(key)
