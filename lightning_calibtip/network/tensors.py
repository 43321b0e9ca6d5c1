"""Observed tensors: the activations that layers read or write, each with one observer and its quantizers."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..batches import is_finite
from ..quantization.observers import Observer
from ..quantization.quantizers import Quantizer, make_quantizer
from ..quantization.spec import Channels, TensorSpec
from ..quantization.tokens import token_mask


@dataclass(eq=False)
class ObservedTensor:
    """One activation of the model, whichever layers read it.

    Layers that read the very same tensor in the same format share one quantizer: one range, one learned scale. The
    observer is shared by all formats, so a layer may go to another bit-width without a new calibration.

    Args:
        name: Name for messages: ``"layer1.0.conv1 input"``.
        token_axes: Dimensions that run over tokens, see ``Operand``.
        readers: Names of the layers that read it (of an output, the layer that writes it).
        observer: What calibration has attached; None before.
        quantizers: Its quantizers by format.
        learnable: Channels that reconstruction may give ratios; None if it may not. Equalization decides.

    Example:
        >>> tensor = ObservedTensor("fc input", readers=["fc", "gate"])
        >>> spec = TensorSpec(8)
        >>> tensor.quantizer(spec, torch.device("cpu")) is tensor.quantizer(spec, torch.device("cpu"))
        True
    """

    name: str
    token_axes: tuple[int, ...] = (1,)
    readers: list[str] = field(default_factory=list)
    observer: Observer | None = None
    quantizers: dict[TensorSpec, Quantizer] = field(default_factory=dict)
    learnable: Channels | None = None
    _seen: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def shared(self) -> bool:
        """Whether several layers read it."""
        return len(self.readers) > 1

    @property
    def observed(self) -> bool:
        """Whether calibration data have passed."""
        return self.observer is not None and self.observer.seen

    def quantizer(self, spec: TensorSpec, device: torch.device) -> Quantizer:
        """The quantizer of this tensor for a format; a new one has the calibrated range, if there is one yet."""
        if spec not in self.quantizers:
            self.quantizers[spec] = make_quantizer(self.name, spec, None, device)
            if self.observed:
                self.fit_range(spec)
        # One that is not in use just now does not move with the model.
        return self.quantizers[spec].to(device)

    def require_observed(self) -> None:
        """Raise ``RuntimeError`` if no calibration data have passed."""
        if not self.observed:
            raise RuntimeError(f"{self.name}: no calibration batch has reached this tensor; run Calibration first.")

    def fit_range(self, spec: TensorSpec) -> None:
        """Choose the range of one format from what was observed.

        Raises:
            RuntimeError: If nothing was observed.
        """
        self.require_observed()
        assert self.observer is not None
        self.quantizers[spec].set_range(*self.observer.compute_range(spec))

    @torch.no_grad()
    def observe(self, x: Tensor, tokens: Tensor | None) -> None:
        """Let the observer see a value of the tensor; a value that several layers read in turn counts once.

        Args:
            x: The value.
            tokens: Which tokens of the batch count, bool, shape (batch, positions); None if all do.

        Raises:
            ValueError: If the value has a NaN or infinity.
        """
        if self.observer is None or self._seen_already(x):
            return
        mask = token_mask(x.shape, tokens, self.token_axes)
        if mask is not None:
            x = x[mask.expand(x.shape)]
        if x.numel() == 0:
            return
        if not is_finite(x):
            raise ValueError(
                f"{self.name}: NaN or infinity in the activations of a calibration batch; check the model in float."
            )
        self.observer.update(x)

    def next_batch(self) -> None:
        """Forget which values have been seen: another calibration batch comes."""
        self._seen.clear()

    def _seen_already(self, x: Tensor) -> bool:
        """Whether this very value, still alive and unchanged, was observed before in the same batch."""
        if not self.shared:
            return False
        state = (x.data_ptr(), x.shape, x.stride(), 0 if x.is_inference() else x._version)
        if any(reference() is not None and tuple(seen) == state for reference, *seen in self._seen):
            return True
        self._seen.append((weakref.ref(x), *state))
        return False


def activation_name(layer: str, operand: int) -> str:
    """Name of the activation that a layer reads as one of its operands.

    Example:
        >>> activation_name("fc", 0), activation_name("product", 1), activation_name("gate", 2)
        ('fc input', 'product second input', 'gate input 3')
    """
    return f"{layer} {('input', 'second input')[operand] if operand < 2 else f'input {operand + 1}'}"
