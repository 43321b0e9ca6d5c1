"""A copy of a quantized model whose quantizers are ONNX operators on integers, for torch.onnx.export."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..module import QuantizationModule
from ..network.hooks import INPUT_QUANTIZERS, OUTPUT_QUANTIZER
from ..network.layer_types import reads_indices
from ..network.layers import QuantizedLayer
from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.quantizers import Quantizer
from ..quantization.spec import PerChannel, PerGroup, TensorSpec
from ..user_model import copy_of

# Opset whose QuantizeLinear and DequantizeLinear know 4-bit integers and blocks.
OPSET = 21


def container(spec: TensorSpec, signed: bool) -> torch.dtype:
    """Return the narrowest integer type of torch that holds the integers of a spec.

    Args:
        spec: Format of a tensor.
        signed: Whether unsigned integers are to be shifted into a signed type.

    Example:
        >>> container(TensorSpec(4), signed=False), container(TensorSpec(9, symmetric=True), signed=False)
        (torch.uint8, torch.int16)
    """
    if spec.symmetric or signed:
        return torch.int8 if spec.bits <= 8 else torch.int16
    return torch.uint8 if spec.bits <= 8 else torch.uint16


class SymbolicQuantizer(nn.Module):
    """Quantizes an activation and dequantizes it again, as ONNX operators.

    Integers of fewer bits than their type has saturate by a Clip. Equalized channels are divided by their ratios in an
    operation of its own: ONNX Runtime fuses a QuantizeLinear by channel into a convolution, or moves it across a
    transposition, and then fails; and where channels come last it calls its kernel for each element.

    Args:
        quantizer: Calibrated quantizer of one tensor, with one range.
        signed: Whether its integers are to be signed, whatever they are in the model.
        absorbed: Whether the module that writes the tensor has divided it by the ratios.

    Raises:
        ValueError: If the quantizer is of another kind than affine, or has ranges at run time.

    Example:
        See ``deployable_copy``.
    """

    scale: Tensor
    zero_point: Tensor
    factor: Tensor

    def __init__(self, quantizer: Quantizer, signed: bool, absorbed: bool = False) -> None:
        super().__init__()
        affine = require_affine(quantizer)
        if affine.spec.dynamic:
            raise ValueError(f"{quantizer.name} has ranges per token, which only exist at run time: per_token=False.")
        self.dtype = container(affine.spec, signed)
        low = torch.iinfo(self.dtype).min
        shift = low if signed and not affine.spec.symmetric else 0
        self.qmin, self.qmax = affine.spec.qmin + shift, affine.spec.qmax + shift
        self.register_buffer("scale", affine.scale.detach().cpu().reshape(()).clone())
        point = affine.zero_point.detach().cpu().round().reshape(()) + shift
        self.register_buffer("zero_point", point.clamp(self.qmin, self.qmax).to(self.dtype))
        divisors = affine.divisors
        self.divides = divisors is not None and not absorbed
        if divisors is not None and affine.spec.equalized is not None:
            factor = 1 / divisors.detach().cpu()
            self.register_buffer("factor", factor.view(-1, *[1] * (-1 - affine.spec.equalized.axis)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the values that the integers of ``x`` stand for."""
        if self.divides:
            x = x * self.factor
        integers = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, self.scale, self.zero_point), {}, dtype=self.dtype, shape=x.shape, version=OPSET
        )
        limits = torch.iinfo(self.dtype)
        if (self.qmin, self.qmax) != (limits.min, limits.max):
            ends = (torch.tensor(end, dtype=self.dtype) for end in (self.qmin, self.qmax))
            integers = torch.onnx.ops.symbolic(
                "Clip", (integers, *ends), {}, dtype=self.dtype, shape=x.shape, version=OPSET
            )
        output: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear", (integers, self.scale, self.zero_point), {}, dtype=torch.float32, shape=x.shape,
            version=OPSET,
        )  # fmt: skip
        return output


class StoredWeight(nn.Module, ABC):
    """A weight as integers in a file.

    Args:
        layer: Layer with a quantized weight of its own.

    Raises:
        ValueError: If the quantizer is of another kind than affine.

    Example:
        See ``deployable_copy``.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        assert layer.weight_quantizer is not None
        self.store(layer.integer_weight().cpu(), require_affine(layer.weight_quantizer))

    @abstractmethod
    def store(self, weight: Tensor, quantizer: AffineQuantizer) -> None:
        """Register the integers, scales and zero points as buffers, in the shapes that ``forward`` wants."""


class SymbolicWeight(StoredWeight):
    """Takes the place of a weight's quantizer: gives the dequantized integers, whatever it is given.

    Args:
        layer: See ``StoredWeight``.

    Example:
        See ``deployable_copy``.
    """

    def store(self, weight: Tensor, quantizer: AffineQuantizer) -> None:
        """See ``StoredWeight``."""
        spec = quantizer.spec
        self.shape, self.axis, self.group = weight.shape, None, 0
        scale, point = quantizer.scale.detach().cpu().clone(), quantizer.zero_point.detach().cpu().round()
        match spec.granularity:
            case PerChannel(axis):
                self.axis = axis
            case PerGroup(size, axis):
                # Blocks lie along one dimension.
                self.axis, self.group = axis, size
                weight = weight.movedim(axis, 0).flatten(1)
                scale, point = scale.view(weight.shape[0], -1), point.view(weight.shape[0], -1)
            case _:
                scale, point = scale.reshape(()), point.reshape(())
        kind = container(spec, signed=False)
        self.register_buffer("integers", weight.to(kind))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", point.to(kind))

    def forward(self, x: Tensor) -> Tensor:
        """Return the weight."""
        attributes: dict[str, Any] = {} if self.axis is None else {"axis": self.axis}
        if self.group:
            attributes = {"axis": 1, "block_size": self.group}
        weight: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear", (self.integers, self.scale, self.zero_point), attributes, dtype=torch.float32,
            shape=self.integers.shape, version=OPSET,
        )  # fmt: skip
        if self.group:
            assert self.axis is not None
            others = [length for dim, length in enumerate(self.shape) if dim != self.axis]
            weight = weight.reshape(self.shape[self.axis], *others).movedim(0, self.axis)
        return weight


class SymbolicEmbedding(StoredWeight):
    """Looks rows of integers up, and dequantizes only these.

    Args:
        layer: See ``StoredWeight``.

    Example:
        See ``deployable_copy``.
    """

    def store(self, weight: Tensor, quantizer: AffineQuantizer) -> None:
        """See ``StoredWeight``."""
        self.columns, self.symmetric = weight.shape[1], quantizer.spec.symmetric
        granularity = quantizer.spec.granularity
        self.repeats = granularity.size if isinstance(granularity, PerGroup) else 1
        rows = weight.shape[0] if isinstance(granularity, PerGroup | PerChannel) else 1
        self.register_buffer("integers", weight.to(container(quantizer.spec, signed=False)))
        self.register_buffer("scale", quantizer.scale.detach().cpu().view(rows, -1).clone())
        self.register_buffer("zero_point", quantizer.zero_point.detach().cpu().round().view(rows, -1))

    def forward(self, indices: Tensor) -> Tensor:
        """Return the rows, float32, of the shape of ``indices`` and one dimension more."""
        rows = F.embedding(indices, self.integers).float()
        if not self.symmetric:
            rows = rows - self._of_rows(self.zero_point, indices)
        return rows * self._of_rows(self.scale, indices)

    def _of_rows(self, parameter: Tensor, indices: Tensor) -> Tensor:
        found = F.embedding(indices, parameter) if len(parameter) > 1 else parameter[0]
        if self.repeats == 1:
            return found
        return found.repeat_interleave(self.repeats, -1)[..., : self.columns]


def require_affine(quantizer: Quantizer) -> AffineQuantizer:
    """Return a quantizer whose numbers ONNX's operators compute.

    Raises:
        ValueError: If it is of another kind; the message names the tensor.

    Example:
        >>> require_affine(AffineQuantizer("x", TensorSpec(), rows=1)).name
        'x'
    """
    if isinstance(quantizer, AffineQuantizer) and quantizer.acts_as_stored:
        return quantizer
    raise ValueError(
        f"{quantizer.name} has a quantizer of the kind {quantizer.spec.kind!r}, which ONNX has no operators for: "
        "calibrate with the kind 'affine' to export."
    )


def deployable_copy(module: QuantizationModule, signed_activations: bool) -> nn.Module:
    """Copy the model of a quantized module, with quantizers that are ONNX operators.

    Args:
        module: Calibrated module; it stays as it is.
        signed_activations: Whether integers of activations are to be signed.

    Returns:
        The model on the CPU, for ``torch.onnx.export``; it cannot be run.

    Raises:
        ValueError: If a quantizer is of a kind that ONNX has no operators for.

    Example:
        See ``export_onnx``.
    """
    model = copy_of(module.model).cpu().eval()
    made: dict[int, SymbolicQuantizer] = {}
    absorbed = _absorbed_ratios(module)
    for name, layer in module.network.layers.items():
        copied = model.get_submodule(name)
        if (bias := layer.acting_bias()) is not None:
            copied.bias.data = bias.detach().cpu().clone()
        owner = layer.tied_to or layer
        if owner.weight_quantizer is not None:
            parent, _, child = name.rpartition(".")
            if _is_plain_embedding(layer):
                setattr(model.get_submodule(parent), child, SymbolicEmbedding(owner))
                continue
            parametrizations: Any = copied.parametrizations[owner.type.weight]  # type: ignore[index]
            parametrizations[0] = SymbolicWeight(owner)
        elif layer.has_weight:
            copied.parametrizations[layer.type.weight].original.data = layer.latent()[0].cpu()  # type: ignore
        activations = {f"{INPUT_QUANTIZERS}.{i}": each for i, each in enumerate(layer.input_quantizers)}
        activations[OUTPUT_QUANTIZER] = layer.output_quantizer
        for place, quantizer in activations.items():
            if quantizer is not None:
                parent, _, child = f"{name}.{place}".rpartition(".")
                is_absorbed = any(quantizer is other for other, _ in absorbed.values())
                if id(quantizer) not in made:
                    made[id(quantizer)] = SymbolicQuantizer(quantizer, signed_activations, is_absorbed)
                model.get_submodule(parent)._modules[child] = made[id(quantizer)]
    for name, (_, ratio) in absorbed.items():
        _divide_output(model.get_submodule(name), module.network.layers.get(name), ratio)
    return model


def _absorbed_ratios(module: QuantizationModule) -> dict[str, tuple[Quantizer, Tensor]]:
    """Modules that take in the ratios of the activation that they write: its quantizer, and the ratios."""
    readers = {
        layer.tensors[0].name: layer for layer in module.network.layers.values() if layer.input_ratio is not None
    }
    found: dict[str, tuple[Quantizer, Tensor]] = {}
    for planned in module.network.plan.modules:
        reader = readers.get(planned.absorbs or "")
        if reader is not None and reader.input_ratio is not None and reader.input_quantizers[0] is not None:
            found[planned.name] = reader.input_quantizers[0], reader.input_ratio.detach().cpu()
    return found


def _divide_output(copied: Any, layer: QuantizedLayer | None, ratio: Tensor) -> None:
    """Divide each channel of what a module gives: of a layer by its scales, of a normalization by its weights."""
    # Parameters of their own, since others may share these.
    bias = getattr(copied, "bias", None)
    if isinstance(bias, Tensor):
        copied.bias = nn.Parameter(bias.detach() / ratio, requires_grad=False)
    if layer is None:
        copied.weight = nn.Parameter(copied.weight.detach() / ratio, requires_grad=False)
        return
    stored = copied.parametrizations[layer.type.weight][0]
    if isinstance(stored, SymbolicWeight):
        stored.scale = stored.scale / ratio.view(-1, *[1] * (stored.scale.dim() - 1))
    else:
        original = copied.parametrizations[layer.type.weight].original
        original.data = original.data / ratio.view(-1, *[1] * (original.dim() - 1))


def _is_plain_embedding(layer: QuantizedLayer) -> bool:
    module = layer.module
    is_lookup = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    return reads_indices(module) and is_lookup and module.max_norm is None
