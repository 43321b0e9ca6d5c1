"""Sparse activations in 4 bits: SPARQ (Shomron, Gabbay, Kurzum, Weiser 2021). A simulation: no engine runs it yet."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .affine_quantizer import AffineQuantizer
from .quantizers import register_quantizer
from .spec import TensorSpec

# Distance of neighbouring places of the 4-bit window, by how many places there are in 8 bits.
_DISTANCES = {5: 1, 3: 2, 2: 4}
_GREATEST = 15


def trim(q: Tensor, windows: int = 5) -> Tensor:
    """Cut 8-bit integers to the 4-bit window that begins at, or next above, their leading one.

    The bits below are rounded off, half up; what would be 16 saturates at 15.

    Args:
        q: Whole numbers from 0 to 255, any integer type.
        windows: Number of places of the window: 5 (at every bit), 3 (at every second) or 2 (the low and the high half).

    Returns:
        The integers that remain, int32.

    Example:
        >>> trim(torch.tensor([9, 27, 255]), windows=5).tolist(), trim(torch.tensor([27]), windows=2).tolist()
        ([9, 28, 240], [32])
    """
    q, distance = q.to(torch.int32), _DISTANCES[windows]
    needed = sum((q >= 2**bit).to(torch.int32) for bit in range(4, 8))
    shift = (needed + distance - 1) // distance * distance
    half = torch.where(shift > 0, 2 ** (shift - 1).clamp_min(0), torch.zeros_like(q))
    return ((q + half) >> shift).clamp_max(_GREATEST) << shift


def trim_pairs(q: Tensor, axis: int, windows: int = 5) -> Tensor:
    """Cut 8-bit integers as ``trim`` does, but for those whose neighbour is 0: such a pair has 8 bits for the other.

    Args:
        q: Whole numbers from 0 to 255.
        axis: Dimension along which elements 0 and 1, 2 and 3, ... are neighbours. A last one without neighbour keeps
            its bits.
        windows: See ``trim``.

    Example:
        >>> trim_pairs(torch.tensor([27, 0, 27, 3]), axis=0).tolist()
        [27, 0, 28, 3]
    """
    moved = q.movedim(axis, -1)
    pairs = torch.nn.functional.pad(moved, (0, moved.shape[-1] % 2)).unflatten(-1, (-1, 2))
    neighbours = pairs.flip(-1).flatten(-2)[..., : moved.shape[-1]].movedim(-1, axis)
    return torch.where(neighbours == 0, q.to(torch.int32), trim(q, windows))


@register_quantizer("sparq")
class SparqQuantizer(AffineQuantizer):
    """8-bit activations that are never negative, of which 4 bits each are kept: those that begin at the leading one.

    Where one of two neighbours along the reduction is 0, the other keeps its 8 bits. The accumulated products have as
    many bits as in 8-bit arithmetic. Gradients pass as if nothing was cut.

    Options (``activation_options`` of ``QuantizationScheme``): ``windows``, 5, 3 or 2 places of the window; ``pairs``,
    whether neighbours share their bits.

    Args:
        name: Name of the tensor.
        spec: Its format: 8 bits, unsigned, with one scale.
        rows: Number of scales, 1.

    Raises:
        ValueError: If the format is another one, or an option is out of its range.

    Example:
        >>> spec = TensorSpec(8, kind="sparq", options=(("axis", -1), ("pairs", True), ("windows", 5)))
        >>> quantizer = SparqQuantizer("x", spec, rows=1)
        >>> quantizer.set_range(torch.tensor([0.0]), torch.tensor([255.0]))
        >>> quantizer.fake_quantize(torch.tensor([27.2, 0.0, 27.2, 3.0])).tolist()
        [27.0, 0.0, 28.0, 3.0]
    """

    is_simulation = True
    _total: int
    _seen: Tensor | None

    def __init__(self, name: str, spec: TensorSpec, rows: int) -> None:
        super().__init__(name, spec, rows)
        options = dict(spec.options)
        self.windows, self.axis = options.get("windows", 5), options.get("axis")
        if spec.bits != 8 or spec.symmetric or spec.dynamic or rows != 1:
            raise ValueError(
                f"{name}: sparq cuts unsigned activations of 8 bits with one scale to 4, got {spec}: give this layer "
                "8-bit activations by overrides, without activation_symmetric and per_token."
            )
        if options.get("pairs", True) and self.axis is None:
            raise ValueError(
                f"{name}: the dimension that is summed over is not known, along which neighbours are paired: give "
                'activation_options={"pairs": False}, or leave the inputs of this layer in float by overrides.'
            )
        # How many values have passed; how many of them were 0, and how many were cut.
        self._total, self._seen = 0, None

    @classmethod
    def parse_options(cls, given: Mapping[str, Any], channel_axis: int | None) -> dict[str, Any]:
        """See ``Quantizer``."""
        if unknown := sorted(given.keys() - {"windows", "pairs"}):
            raise ValueError(f"sparq has no option {unknown[0]!r}; its options are windows and pairs.")
        windows, pairs = given.get("windows", 5), given.get("pairs", True)
        if windows not in _DISTANCES or isinstance(windows, bool):
            raise ValueError(f"windows must be one of {', '.join(map(str, _DISTANCES))}, got {windows!r}.")
        if not isinstance(pairs, bool):
            raise ValueError(f"pairs must be true or false, got {pairs!r}.")
        axis = {"axis": channel_axis} if pairs and channel_axis is not None else {}
        return {"windows": windows, "pairs": pairs, **axis}

    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """See ``Quantizer``; values below 0 are refused, since their integers have no leading zeros."""
        if bool((minimum < 0).any()):
            raise ValueError(
                f"{self.name}: values down to {float(minimum.min()):.4g} pass here, and sparq is for activations that "
                "are never negative (after a ReLU): leave the inputs of this layer in float, "
                'overrides={"<layer>": (8, None)}.'
            )
        super().set_range(minimum, maximum)
        self._total, self._seen = 0, None

    def trainables(self) -> list[Any]:
        """See ``Quantizer``: the scale; the zero point stays 0."""
        return [trainable for trainable in super().trainables() if trainable.role != "zero_point"]

    def encode(self, x: Tensor) -> Tensor:
        """See ``Quantizer``: the integers that remain."""
        whole = super().encode(x)
        return self._trimmed(whole).to(whole.dtype)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See ``Quantizer``."""
        rounded = super().fake_quantize(x)
        whole = super().encode(x.detach())
        kept = self._trimmed(whole)
        if not torch.is_grad_enabled():
            # Counted on the device, which nothing has to wait for.
            found = torch.stack([(whole == 0).sum(), (kept != whole).sum()])
            self._total += whole.numel()
            self._seen = found if self._seen is None else self._seen.to(found) + found
        # What was cut is a number of steps.
        return rounded + ((kept - whole) * self.scale).to(rounded.dtype)

    def _trimmed(self, whole: Tensor) -> Tensor:
        whole = whole.to(torch.int32)
        return trim(whole, self.windows) if self.axis is None else trim_pairs(whole, self.axis, self.windows)

    def shares(self) -> dict[str, float]:
        """See ``Quantizer``: of zeros, and of what was cut."""
        if self._seen is None:
            return {}
        zeros, cut = self._seen.tolist()
        return {"zeros": zeros / self._total, "cut": cut / self._total}
