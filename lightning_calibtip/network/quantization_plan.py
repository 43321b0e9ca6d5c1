"""What becomes of every module of one model, as plain values that can be compared, printed and stored."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..quantization.spec import LayerConfig
from .layer_types import quantizable_layers
from .structure import Fold


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one module.

    Args:
        name: Full name in the model; ``""`` for the model itself.
        type: Name of its class.
        role: ``"layer"`` (of a quantizable type), ``"normalization"`` (a BatchNorm), ``"matmul"`` (computes matrix
            products of its own) or ``"module"`` (anything else with parameters).
        parameters: Number of the weights of a quantized layer, or of all own parameters of what stays in float.
        config: Format of a layer that is quantized; None for everything else.
        reason: Why it stays in float; of a quantized layer, what else was done to it.
        folded_into: Layer that a BatchNorm is folded into.
        tied_to: Layer that owns the weight of this one.
        copies: Names of shared parameters that the layer gets a copy of.
        reads: Names of the activations that it reads, one for each operand; layers that read the same one share its
            quantizers.
        pinned: Whether the user has said which bit-widths it has.
        used_by: Name of the module that takes the layer's weight for a function of its own, which is led to the layer.
        absorbs: Name of the activation whose ratios, if its channels are equalized, the module takes in when it is
            exported.
        sums_over: Dimension that products with a parameter sum over, where the parameter is a module of its own, see
            ``ProductWeight``; None for all other modules.

    Example:
        See ``plan``.
    """

    name: str
    type: str
    role: str
    parameters: int = 0
    config: LayerConfig | None = None
    reason: str = ""
    folded_into: str | None = None
    tied_to: str | None = None
    copies: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    pinned: bool = False
    absorbs: str | None = None
    used_by: str | None = None
    sums_over: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        config = None if self.config is None else self.config.to_dict()
        return {**asdict(self), "config": config, "copies": list(self.copies), "reads": list(self.reads)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModulePlan":
        """Inverse of ``to_dict``."""
        config = None if values["config"] is None else LayerConfig.from_dict(values["config"])
        sequences = {"copies": tuple(values["copies"]), "reads": tuple(values["reads"])}
        return cls(**{**values, "config": config, **sequences})


@dataclass(frozen=True)
class QuantizationPlan:
    """What becomes of every module of one model, in the order of execution; what does not run comes last.

    Example:
        See ``plan``.
    """

    modules: tuple[ModulePlan, ...]

    @cached_property
    def layers(self) -> dict[str, ModulePlan]:
        """The quantized layers by name."""
        return {module.name: module for module in self.modules if module.config is not None}

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """The BatchNorms that are folded, each with its layer."""
        return tuple(Fold(module.folded_into, module.name) for module in self.modules if module.folded_into is not None)

    @cached_property
    def tied(self) -> dict[str, str]:
        """Layers that have the weight of another one, and which."""
        return {name: layer.tied_to for name, layer in self.layers.items() if layer.tied_to is not None}

    @cached_property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """Names of the activations that each quantized layer reads."""
        return {name: layer.reads for name, layer in self.layers.items()}

    @cached_property
    def float_layers(self) -> dict[str, str]:
        """Layers of a quantizable type that stay in float, and why."""
        return self._float("layer")

    @cached_property
    def unfolded_norms(self) -> dict[str, str]:
        """BatchNorms that are not folded, and why."""
        return self._float("normalization")

    @cached_property
    def float_matmuls(self) -> dict[str, str]:
        """Modules that compute matrix products outside of quantizable layers, and which."""
        return self._float("matmul")

    def _float(self, role: str) -> dict[str, str]:
        found = [module for module in self.modules if module.role == role]
        return {module.name: module.reason for module in found if module.config is None and module.folded_into is None}

    def with_configs(self, configs: Mapping[str, LayerConfig]) -> "QuantizationPlan":
        """The same plan with other formats of some quantized layers."""
        return QuantizationPlan(
            tuple(
                replace(module, config=configs[module.name]) if module.name in configs else module
                for module in self.modules
            )
        )

    def with_float_layer(self, name: str, reason: str, parameters: int) -> "QuantizationPlan":
        """The same plan with a layer left in float after all."""
        changes: dict[str, Any] = {"config": None, "reason": reason, "parameters": parameters, "pinned": False}
        changes |= {"tied_to": None, "reads": ()}
        return QuantizationPlan(
            tuple(replace(module, **changes) if module.name == name else module for module in self.modules)
        )

    def with_absorbers(self, absorbers: Mapping[str, str]) -> "QuantizationPlan":
        """The same plan with modules that take in the ratios of activations.

        Args:
            absorbers: Name of the activation by that of the module.
        """
        return QuantizationPlan(tuple(replace(module, absorbs=absorbers.get(module.name)) for module in self.modules))

    def with_float_matmul(self, name: str, type_name: str, reason: str) -> "QuantizationPlan":
        """The same plan with one more module that computes matrix products in float."""
        return QuantizationPlan((*self.modules, ModulePlan(name, type_name, "matmul", reason=reason)))

    @classmethod
    def pending(cls, model: nn.Module) -> "QuantizationPlan":
        """The modules with parameters of a model that has not been observed yet."""
        layers = quantizable_layers(model)
        found = []
        for name, module in model.named_modules():
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            reason = "not calibrated yet" if name in layers else "not a quantizable type of layer"
            if own and ".parametrizations." not in f".{name}.":
                found.append(ModulePlan(name, class_name(module), "module", own, reason=reason))
        return cls(tuple(found))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"modules": [module.to_dict() for module in self.modules]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationPlan":
        """Inverse of ``to_dict``."""
        return cls(tuple(map(ModulePlan.from_dict, values["modules"])))


def class_name(module: nn.Module) -> str:
    """Name of a module's class, as it was before a tensor of it was parametrized.

    Example:
        >>> class_name(nn.Linear(2, 2))
        'Linear'
    """
    cls = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    return cls.__name__
