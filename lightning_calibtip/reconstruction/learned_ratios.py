"""Ratios of equalized channels that go on learning while a unit is reconstructed."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..network.channels import along_weight
from ..network.layers import QuantizedLayer
from ..network.tensors import ObservedTensor
from ..quantization.quantizers import AffineQuantizer, Quantizer
from .equalizable import input_format


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
    for layer in layers:
        readers.setdefault(layer.tensors[0], []).append(layer)
    for tensor, reading in readers.items():
        formats = {input_format(layer) for layer in reading}
        if not tensor.may_learn_ratios or not names.issuperset(tensor.readers) or len(formats) != 1 or None in formats:
            continue
        ((spec, channels),) = (each for each in formats if each is not None)
        present = tensor.quantizers[spec]
        if spec.equalized is not None or present in fixed:
            continue
        for layer in reading:
            layer.install(replace(layer.config, inputs=(replace(spec, equalized=channels),)))
        equalized = tensor.quantizers[replace(spec, equalized=channels)]
        assert isinstance(present, AffineQuantizer) and isinstance(equalized, AffineQuantizer)
        assert equalized.ratio is not None
        equalized.scale.copy_(present.scale)
        equalized.zero_point.copy_(present.zero_point)
        equalized.ratio.fill_(1.0)


@contextmanager
def weights_following(layers: Sequence[QuantizedLayer]) -> Iterator[None]:
    """Inside, the weights of the layers follow the ratios of their inputs, so that gradients reach a ratio through the
    input and through the weight; at the end the latent weights have taken in what has changed.

    Args:
        layers: Layers whose first input has ratios.
    """
    following = [(layer, _FollowingWeight(layer)) for layer in layers]
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
