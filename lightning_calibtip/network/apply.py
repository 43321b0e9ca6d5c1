"""Applying a plan: the only code that changes a model."""

from collections.abc import Mapping

import torch
from torch import nn

from .folding import apply_fold
from .layer_types import layer_type_of, quantizable_layers
from .layers import QuantizedLayer
from .operation_kinds import is_operation
from .preparations import preparations
from .product_inputs import input_name
from .product_parameters import hold_product_parameters
from .product_weights import parameter_name
from .quantization_plan import ModulePlan, QuantizationPlan
from .routing import Routes, route
from .tensors import ObservedTensor
from .tying import bake_parametrizations, find_ties, own_parameter


def apply(model: nn.Module, plan: QuantizationPlan) -> dict[str, QuantizedLayer]:
    """Make a float model what the plan says: BatchNorms folded, quantizers attached (and switched off).

    Args:
        model: The float model, changed in place; in eval mode.
        plan: From ``plan`` for this model, or from a checkpoint of it.

    Returns:
        The quantized layers by name, in the order of the plan.

    Raises:
        ValueError: If the plan is of another model: a module is missing, is of another type, or weights that the plan
            ties are not tied.

    Example:
        >>> from lightning_calibtip.network.observe import observe
        >>> from lightning_calibtip.network.plan import plan
        >>> from lightning_calibtip.network.scheme import QuantizationScheme
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> structure = observe(model, lambda: model(torch.ones(1, 2)))
        >>> layers = apply(model, plan(model, structure, QuantizationScheme()))
        >>> list(layers), type(model[0].parametrizations.weight[0]).__name__
        (['0', '2'], 'AffineQuantizer')
    """
    planned = [module.name for module in plan.modules if module.role == "layer"]
    for preparation in preparations():
        preparation.restore(model, planned)
    _hold_parameters(model, plan)
    route(model, _routes(plan))
    _check(model, plan)
    # This model may share more than the one that was planned for; nothing but the planned ties stays shared.
    ties = find_ties(model, quantizable_layers(model))
    for module_plan in plan.modules:
        if module_plan.role == "layer":
            # Also of layers that stay in float: what they share would be folded into and reconstructed.
            name, layer = module_plan.name, model.get_submodule(module_plan.name)
            bake_parametrizations(layer)
            copies = {*module_plan.copies, *ties.copies.get(name, ())}
            if name in ties.tied and plan.tied.get(name) != ties.tied[name]:
                layer_type = layer_type_of(layer)
                copies.add((layer_type and layer_type.weight) or "weight")
            for parameter in sorted(copies):
                own_parameter(layer, parameter)
    for fold in plan.folds:
        apply_fold(model, fold)
    tensors = _observed_tensors(plan)
    layers: dict[str, QuantizedLayer] = {}
    # Owners of tied weights come first.
    for name in sorted(plan.layers, key=lambda name: plan.layers[name].tied_to is not None):
        layers[name] = _attach(model, plan.layers[name], tensors, layers)
    return {name: layers[name] for name in plan.layers}


def _hold_parameters(model: nn.Module, plan: QuantizationPlan) -> None:
    """Give modules to the parameters that the plan names, as observing would."""
    names = {module.name for module in plan.modules}
    inputs: set[str] = set()
    found: dict[str, dict[str, int]] = {}
    for each in plan.modules:
        if each.sums_over is not None:
            owner, _, parameter = parameter_name(each.name).rpartition(".")
            found.setdefault(owner, {})[parameter] = each.sums_over
            if input_name(parameter_name(each.name)) in names:
                inputs.add(owner)
    hold_product_parameters(model, found, inputs)


def _routes(plan: QuantizationPlan) -> Routes:
    """What is led to modules: operations that are layers, and those whose products are."""
    planned = [module for module in plan.modules if module.role == "layer"]
    names = [place for each in planned for place in (each.name, each.name.rpartition(".")[0]) if is_operation(place)]
    layers = {each.name: each.used_by for each in planned if each.used_by is not None}
    return Routes(tuple(dict.fromkeys(names)), layers)


def _check(model: nn.Module, plan: QuantizationPlan) -> None:
    modules = dict(model.named_modules())
    layers = [module.name for module in plan.modules if module.role == "layer"]
    wanted = {*layers, *(name for fold in plan.folds for name in (fold.layer, fold.normalization))}
    if missing := sorted(wanted - modules.keys()):
        raise ValueError(f"The checkpoint is of another model: this one has no module {', '.join(missing[:5])}.")
    for name in plan.layers:
        layer_type = layer_type_of(modules[name])
        if layer_type is None or len(layer_type.operands) != len(plan.layers[name].reads):
            raise ValueError(
                f"The checkpoint is of another model: {name} is a {type(modules[name]).__name__} here, and was a "
                f"{plan.layers[name].type}; register a layer type of your own with register_layer() before loading."
            )
    tied = find_ties(model, {name: modules[name] for name in plan.layers}).tied
    untied = [name for name, layer in plan.layers.items() if layer.tied_to and tied.get(name) != layer.tied_to]
    if untied:
        raise ValueError(
            f"The checkpoint has the weight of {', '.join(sorted(untied))} tied to an embedding's, this model has not: "
            "tie it (tie_word_embeddings) before loading."
        )


def _observed_tensors(plan: QuantizationPlan) -> dict[str, ObservedTensor]:
    """The activations that the quantized layers read, by name."""
    tensors: dict[str, ObservedTensor] = {}
    for layer in plan.layers.values():
        for name in layer.reads:
            readers = tensors.setdefault(name, ObservedTensor(name)).readers
            if layer.name not in readers:
                readers.append(layer.name)
    return tensors


def _attach(
    model: nn.Module,
    planned: ModulePlan,
    tensors: Mapping[str, ObservedTensor],
    layers: Mapping[str, QuantizedLayer],
) -> QuantizedLayer:
    module = model.get_submodule(planned.name)
    layer_type = layer_type_of(module)
    assert layer_type is not None and planned.config is not None
    read = tuple(tensors[name] for name in planned.reads)
    for tensor, operand in zip(read, layer_type.operands, strict=True):
        if not layer_type.between_layers or len(tensor.readers) == 1:
            tensor.token_axes = operand.token_axes
    written = ObservedTensor(f"{planned.name} output", layer_type.output_token_axes, [planned.name])
    tied_to = layers[planned.tied_to] if planned.tied_to else None
    parent = model.get_submodule(planned.name.rpartition(".")[0])
    device = next((p.device for p in (*parent.parameters(), *model.parameters())), torch.device("cpu"))
    layer = QuantizedLayer(
        planned.name, module, layer_type, planned.config, read, written, tied_to, first_device=device
    )
    layer.attach()
    return layer
