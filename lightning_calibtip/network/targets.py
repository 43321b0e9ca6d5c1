"""Targets: what an engine asks of the formats of a quantized model, decided before calibration."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..quantization.quantizers import is_simulation
from ..quantization.spec import LayerConfig, PerGroup, TensorSpec
from .layer_types import LayerType

if TYPE_CHECKING:
    from .scheme import QuantizationScheme

# Of the CalibTIP callback and of the recipes: OpenVINO runs its formats, too.
DEFAULT_TARGET = "onnxruntime"

_NO_TARGET = "target=None (on the command line null)"

_TARGETS: dict[str, "Target"] = {}


@dataclass(frozen=True)
class Target:
    """An engine that the quantized model is to run on, as far as it decides how tensors are quantized.

    Args:
        name: Name, for ``QuantizationScheme(target=...)``.
        symmetric_weights: Whether its kernels need weights with zero points of 0.
        symmetric_activations: Whether its kernels need activations with zero points of 0.
        signed_activations: Whether exported activations are signed integers (int8) rather than unsigned ones (uint8);
            the values that they stand for are the same.
        weight_bits: Bit-widths of weights that it can run, in whichever container.
        activation_bits: Bit-widths of activations that it can run; empty if it runs activations in float.
        between_bits: Bit-width of what is quantized between layers: operands of additions and inputs of average pools,
            where integers come in and go out, and outputs of convolutions that no quantizer reads. None where the
            engine needs nothing of that.
        integer_bias: Whether biases are added as integers, on the grid of the products.
        groups: Whether weights may have scales for groups.
        float_layers: Whether layers of quantizable types may stay in float.
        absorb: Which inputs ``Equalization`` may give ratios of their channels: ``"prefer"``, ``"engine"`` or
            ``"only"``, see ``EqualizationOptions``.

    Raises:
        ValueError: If the name is empty.

    Example:
        >>> Target("mine", activation_bits=()).check_bits(4, None, "overrides['fc']")
    """

    name: str
    symmetric_weights: bool = False
    symmetric_activations: bool = False
    signed_activations: bool = False
    weight_bits: Iterable[int] = range(2, 9)
    activation_bits: Iterable[int] = range(2, 9)
    between_bits: int | None = None
    integer_bias: bool = False
    groups: bool = False
    float_layers: bool = True
    absorb: str = "prefer"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("A target needs a name, got ''.")
        object.__setattr__(self, "weight_bits", tuple(self.weight_bits))
        object.__setattr__(self, "activation_bits", tuple(self.activation_bits))

    def check(self, scheme: "QuantizationScheme") -> None:
        """Refuse a scheme that this engine cannot run.

        Raises:
            ValueError: If it cannot; the message names the option, its value and the remedy.
        """
        for option in ("weight_quantizer", "activation_quantizer"):
            if is_simulation(kind := getattr(scheme, option)):
                raise ValueError(
                    f"{option}={kind!r} is a simulation that no engine runs: give {_NO_TARGET}, got "
                    f"target={self.name!r}."
                )
        if scheme.per_token:
            raise ValueError(
                f"per_token=True needs ranges at run time, which target={self.name!r} cannot run: leave it out, or "
                f"give {_NO_TARGET} for a model that is not exported."
            )
        if self.symmetric_weights and scheme.symmetric is False:
            raise ValueError(
                f"symmetric=False gives weights zero points, which target={self.name!r} cannot run in integers: leave "
                "it out, or give target=None or target='weights'."
            )
        if not self.groups and scheme.group_size is not None:
            raise ValueError(
                f"group_size={scheme.group_size}: target={self.name!r} has no integer kernels for weights in groups: "
                f"leave it out, or give {_NO_TARGET}, or target='weights' and activation_bits=None."
            )
        if self.symmetric_weights and scheme.activation_symmetric and not self.symmetric_activations:
            raise ValueError(
                f"activation_symmetric=True: target={self.name!r} wants activations with zero points: leave it out, or "
                f"give {_NO_TARGET} for a model that is not exported."
            )
        self.check_bits(scheme.weight_bits, scheme.activation_bits, "weight_bits and activation_bits")
        if scheme.edge_bits is not None:
            edges = scheme.bit_widths(scheme.edge_bits, "edge_bits")
            self.check_bits(edges.weight, edges.activation, "edge_bits")
        for pattern, value in (scheme.overrides or {}).items():
            if value is not None:
                given = scheme.bit_widths(value, f"overrides[{pattern!r}]")
                self.check_bits(given.weight, given.activation, f"overrides[{pattern!r}]")

    def check_bits(self, weight: int | None, activation: int | None, what: str, remedy: str = _NO_TARGET) -> None:
        """Refuse bit-widths that this engine has no integers for; None stands for float.

        Args:
            weight: Bit-width of a weight.
            activation: Bit-width of an activation.
            what: Name of what has them, for the message.
            remedy: What can be done besides taking others.

        Raises:
            ValueError: If it has none; the message names ``what``.
        """
        kinds = (("weights", weight, self.weight_bits), ("activations", activation, self.activation_bits))
        for name, bits, allowed in kinds:
            if bits is not None and bits not in allowed:
                others = f"give one of {', '.join(map(str, allowed))}" if allowed else "give None, for float"
                raise ValueError(
                    f"{what}: target={self.name!r} does not run {name} at {bits} bits; {others}, or {remedy}."
                )

    def config(self, name: str, layer_type: LayerType, config: LayerConfig) -> LayerConfig:
        """Format of a layer on this target; to override in a target of one's own.

        Args:
            name: Full name of the layer.
            layer_type: Its type.
            config: Format that the scheme gives it.

        Raises:
            ValueError: If no engine computes with its tensors quantized.
        """
        require_engine(name, layer_type, config, f"target={self.name!r}")
        weight = config.weight
        if weight is not None and self.symmetric_weights:
            weight = replace(weight, symmetric=True)
        inputs = tuple(None if spec is None else self.activation(spec) for spec in config.inputs)
        output = None if config.output is None else self.activation(config.output)
        return LayerConfig(weight, inputs, output, self._adds_integers(layer_type, weight, inputs))

    def _adds_integers(
        self, layer_type: LayerType, weight: TensorSpec | None, inputs: tuple[TensorSpec | None, ...]
    ) -> bool:
        """Whether the engine adds the bias to sums of integers."""
        if not self.integer_bias or not layer_type.adds_bias or weight is None or len(inputs) != 1:
            return False
        spec = inputs[0]
        in_groups = isinstance(weight.granularity, PerGroup)
        return spec is not None and not spec.dynamic and not in_groups and spec.kind == weight.kind == "affine"

    def activation(self, spec: TensorSpec) -> TensorSpec:
        """Format of an activation on this target."""
        if not self.symmetric_activations:
            return spec
        # The zero point of such an engine is 0, whatever the range.
        return replace(spec, symmetric=True, one_sided=False, nonnegative=False)

    def check_config(self, layer: str, layer_type: LayerType, config: LayerConfig) -> None:
        """Refuse the format of a layer that was calibrated without this target.

        Raises:
            ValueError: If the engine cannot run it; the message names the layer and the remedy.
        """
        remedy = f"quantize the model again with target={self.name!r} (--target {self.name}), and export that one."
        weight = config.weight
        if weight is not None and self.symmetric_weights and not weight.symmetric:
            raise ValueError(
                f"{layer} has asymmetric weights, which target={self.name!r} cannot run in integers: {remedy}"
            )
        if weight is not None and isinstance(weight.granularity, PerGroup) and not self.groups:
            raise ValueError(f"{layer} has weights in groups, which target={self.name!r} cannot run: {remedy}")
        for spec in (*config.inputs, config.output):
            if spec is not None and spec.dynamic:
                raise ValueError(f"{layer} has ranges per token, which target={self.name!r} cannot run: {remedy}")
            if spec is not None and self.symmetric_activations and (not spec.symmetric or spec.one_sided):
                raise ValueError(f"{layer} has activations with zero points, unlike target={self.name!r}: {remedy}")
        if self._adds_integers(layer_type, weight, config.inputs) and not config.integer_bias:
            raise ValueError(f"{layer} was calibrated without target={self.name!r}, which adds integers: {remedy}")
        self.check_bits(None if weight is None else weight.bits, None, layer, "export for another target")
        for spec in (*config.inputs, config.output):
            self.check_bits(None, None if spec is None else spec.bits, layer, "export for another target")


def require_engine(name: str, layer_type: LayerType, config: LayerConfig, where: str) -> None:
    """Refuse a quantized layer that no engine runs.

    Args:
        name: Full name of the layer.
        layer_type: Its type.
        config: Its format.
        where: What was asked for, for the message.

    Raises:
        ValueError: If there is no such engine.

    Example:
        >>> require_engine("fc", LayerType(), LayerConfig(), "target='onnxruntime'")
    """
    if not layer_type.in_engines and not config.is_float:
        raise ValueError(
            f"{name}: no engine here computes with its tensors quantized, as between the nodes of a graph, so {where} "
            "cannot have it. Quantize with target=None (on the command line null) and keep the result as a checkpoint "
            'or by export_packed, or quantize the weights alone, target="weights".'
        )


def register_target(target: Target) -> Target:
    """Register a target for ``QuantizationScheme(target=...)``, in place of one of the same name.

    Args:
        target: The target.

    Returns:
        The target.

    Example:
        >>> register_target(Target("my_accelerator", symmetric_weights=True, weight_bits=[4, 8], activation_bits=[8]))
        ... # doctest: +ELLIPSIS
        Target(name='my_accelerator', ...)
        >>> find_target("my_accelerator").activation_bits
        (8,)
    """
    _TARGETS[target.name] = target
    return target


def find_target(name: str) -> Target:
    """Find a registered target.

    Raises:
        ValueError: If there is none of this name; the message lists those that there are.

    Example:
        >>> find_target("onnxruntime").symmetric_weights
        True
    """
    if name not in _TARGETS:
        raise ValueError(
            f"target must be one of {', '.join(_TARGETS)} or None, got {name!r}; register_target() adds one."
        )
    return _TARGETS[name]


# ONNX Runtime and OpenVINO fuse quantized additions and pools only where all of their operands are on a grid.
register_target(Target("onnxruntime", symmetric_weights=True, between_bits=8, integer_bias=True, absorb="engine"))
register_target(Target("openvino", symmetric_weights=True, between_bits=8, integer_bias=True, absorb="engine"))
# TensorRT has no zero points at all; XNNPACK has signed activations with them.
register_target(
    Target(
        "tensorrt",
        symmetric_weights=True,
        symmetric_activations=True,
        signed_activations=True,
        weight_bits=[8],
        activation_bits=[8],
        between_bits=8,
        integer_bias=True,
        absorb="only",
    )
)
register_target(
    Target(
        "xnnpack",
        symmetric_weights=True,
        signed_activations=True,
        activation_bits=[8],
        between_bits=8,
        integer_bias=True,
        absorb="only",
    )
)
register_target(Target("weights", activation_bits=(), groups=True))
