"""Quantizer: the module that holds scale and zero point of one tensor and applies them."""

import torch
from torch import Tensor, nn

from .affine import check_bits, choose_qparams, fake_quantize, integer_range, quantize
from .kinds import Operand
from .observers import Observer
from .tokens import token_mask


class Quantizer(nn.Module):
    """Fake-quantizes what passes through it, once it is enabled; observes it, while an observer is watching.

    Scale and zero point are parameters without gradients, so that they are saved, moved and, during reconstruction,
    learned like any other.

    Args:
        name: Of the tensor, for messages: ``"layer1.0.conv1 input"``.
        bits: 2 to 16.
        symmetric: Signed integers and a zero point of 0 (``choose_qparams`` has the details).
        axis: Channel dimension, or None for one range for the whole tensor.
        channels: Length of that dimension; 1 without ``axis``.
        one_sided: Whether a symmetric range without negative values may have its zero point at ``qmin``.
        operand: What is known of the layer's input, if it is one.
        dynamic: Whether each token gets the range of its own values whenever it comes; scale and zero point then do not
            act.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        name: str,
        bits: int,
        symmetric: bool,
        axis: int | None = None,
        channels: int = 1,
        one_sided: bool = False,
        operand: Operand | None = None,
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.symmetric, self.axis, self.one_sided = name, symmetric, axis, one_sided
        self.operand, self.dynamic = operand or Operand(), dynamic
        self.bits = check_bits(bits, f"bits of {name}")
        self.scale = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.zero_point = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.enabled = False
        self.observer: Observer | None = None
        self.observing = False
        # Which tokens of the batch that is being observed count.
        self.tokens: Tensor | None = None

    @property
    def qmin(self) -> int:
        """Smallest integer."""
        return integer_range(self.bits, self.symmetric)[0]

    @property
    def qmax(self) -> int:
        """Greatest integer."""
        return integer_range(self.bits, self.symmetric)[1]

    @property
    def learns_zero_point(self) -> bool:
        """Whether the zero point may move from where it is."""
        return not (self.symmetric or self.operand.unsigned)

    @torch.no_grad()
    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Take scale and zero point from a real range (see ``choose_qparams``).

        Raises:
            ValueError: If an end is not finite.
        """
        if not bool(torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
            raise ValueError(f"{self.name}: the range has a NaN or infinite end; check the data and the weights.")
        scale, zero_point = choose_qparams(minimum, maximum, self.bits, self.symmetric, self.one_sided)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    @torch.no_grad()
    def round_zero_point(self) -> None:
        """Make the zero point the whole number that ``forward`` has used all along."""
        self.zero_point.copy_(self.zero_point.round().clamp(self.qmin, self.qmax))

    def integers(self, x: Tensor) -> Tensor:
        """Integers (int32) that stand for ``x``."""
        return quantize(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, fake-quantized when enabled."""
        if self.observing and self.observer is not None:
            self._observe(x)
        if not self.enabled:
            return x
        if self.dynamic:
            return self._quantize_tokens(x)
        return fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis)

    def _quantize_tokens(self, x: Tensor) -> Tensor:
        along = self.operand.contracted
        low, high = x.detach().amin(along, keepdim=True), x.detach().amax(along, keepdim=True)
        scale, zero_point = choose_qparams(low, high, self.bits, self.symmetric, self.one_sided)
        return fake_quantize(x, scale, zero_point, self.qmin, self.qmax)

    def _observe(self, x: Tensor) -> None:
        mask = token_mask(x.shape, self.tokens, self.operand.token_axes)
        if mask is not None:
            x = x[mask.expand(x.shape)]
        if x.numel() == 0:
            return
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"{self.name}: NaN or infinity in the activations of a calibration batch; check the model in float."
            )
        assert self.observer is not None
        self.observer.update(x)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        kind = "symmetric" if self.symmetric else "affine"
        where = "per tensor" if self.axis is None else f"per channel of axis {self.axis}"
        where = "per token" if self.dynamic else where
        return f"{self.bits} bits, {kind}, {where}, {'enabled' if self.enabled else 'disabled'}"
