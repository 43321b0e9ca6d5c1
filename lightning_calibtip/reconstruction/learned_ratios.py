"""Ratios of equalized channels that go on learning while a unit is reconstructed."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..network.channels import along_weight, with_equalization
from ..network.layers import QuantizedLayer
from ..network.tensors import ObservedTensor
from ..quantization.affine_quantizer import AffineQuantizer
from ..quantization.quantizers import Quantizer


@torch.no_grad()
def give_ratios(layers: Sequence[QuantizedLayer], fixed: AbstractSet[Quantizer]) -> None:
    """Give ratios of 1 to the inputs that equalization has left without, where all layers that read them can follow:
    nothing changes until these learn.

    Args:
        layers: Layers of a unit whose weights can follow ratios.
        fixed: Quantizers that must not change.
    """
    names = {layer.name for layer in layers}
    readers: dict[ObservedTensor, list[QuantizedLayer]] = {}
    for layer in [layer for layer in layers if layer.tensors]:
        readers.setdefault(layer.tensors[0], []).append(layer)
    for tensor, reading in readers.items():
        present = reading[0].input_quantizers
        if tensor.learnable is None or not names.issuperset(tensor.readers) or not fixed.isdisjoint(present):
            continue
        if len({layer.config.inputs for layer in reading}) > 1 or not _may_have_ratios(present):
            continue
        for layer in reading:
            layer.install(with_equalization(layer.config, layer.type, tensor.learnable))
        for before, equalized in zip(present, reading[0].input_quantizers, strict=True):
            assert isinstance(before, AffineQuantizer) and isinstance(equalized, AffineQuantizer)
            assert equalized.ratio is not None
            equalized.scale.copy_(before.scale)
            equalized.zero_point.copy_(before.zero_point)
            equalized.ratio.fill_(1.0)


def _may_have_ratios(quantizers: Sequence[Quantizer | None]) -> bool:
    """Whether quantizers are of a kind that divides by ratios, and have none yet."""
    return all(
        isinstance(each, AffineQuantizer) and each.acts_as_stored and each.spec.equalized is None for each in quantizers
    )


@contextmanager
def weights_following(layers: Sequence[QuantizedLayer]) -> Iterator[None]:
    """Inside, the weights of the layers follow the ratios of their inputs, so that gradients reach a ratio through the
    input and through the weight; at the end the latent weights have taken in what has changed.

    Args:
        layers: Layers whose first input has ratios; of products, the second input follows by itself.
    """
    following = [(layer, _FollowingWeight(layer)) for layer in layers if layer.has_weight]
    for layer, stand_in in following:
        _place(layer)[0] = stand_in
    try:
        yield
    finally:
        for layer, stand_in in following:
            _place(layer)[0] = stand_in.rounding
            with torch.no_grad():
                layer.weight.mul_(stand_in.change())


class _FollowingWeight(nn.Module):
    """Multiplies a weight by the change of its input's ratios, before it is rounded."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        assert layer.input_ratio is not None
        self.rounding: nn.Module = _place(layer)[0]
        # Not a parameter of this module: it belongs to the input's quantizer.
        self._of = (layer, layer.input_ratio, layer.input_ratio.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is rounded at the present ratios."""
        rounded: Tensor = self.rounding(weight * self.change())
        return rounded

    @property
    def scale(self) -> Any:
        """Scales of the rounded weight, which say on which grid an integer bias lies."""
        return self.rounding.scale

    def change(self) -> Tensor:
        """Present ratios over the first ones, so that they broadcast along the weight."""
        layer, ratio, first = self._of
        return along_weight(ratio / first, layer.module, layer.type, layer.weight)


def _place(layer: QuantizedLayer) -> Any:
    return layer.module.parametrizations[layer.type.weight]  # type: ignore[index]
