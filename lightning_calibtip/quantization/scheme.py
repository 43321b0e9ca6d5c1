"""The user's choice of bits and number formats, and what it means for each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from .affine import check_bits

Bits = tuple[int, int]


@dataclass(frozen=True)
class QuantizationScheme:
    """Widths and formats of a whole model.

    Args:
        weight_bits: Width of weights, 2 to 16.
        activation_bits: Width of the layers' inputs, 2 to 16.
        edge_bits: Width of weights and inputs of the first and the last layer that run, or None to treat them like the
            rest.
        overrides: By name or pattern (``fnmatch``: ``"layer1.*"``): one width for both, a pair ``(weight_bits,
            activation_bits)``, or None to leave the layer float. Where several match, the last one counts.
        symmetric: Whether weights use signed integers with a zero point of 0.
        per_channel: Whether weights have a scale for each output channel.
        activation_symmetric: The same as ``symmetric`` for the layers' inputs.
        per_token: Whether each token of a layer's input (each sample of a convolution's) gets the range of its own
            values when it comes, in place of one calibrated range.

    Raises:
        ValueError: If a width is out of its range.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    edge_bits: int | None = 8
    overrides: Mapping[str, int | Sequence[int] | None] | None = None
    symmetric: bool = False
    per_channel: bool = True
    activation_symmetric: bool = False
    per_token: bool = False

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.activation_bits, "activation_bits")
        if self.edge_bits is not None:
            check_bits(self.edge_bits, "edge_bits")
        for pattern, value in (self.overrides or {}).items():
            if value is not None:
                check_pair(value, f"overrides[{pattern!r}]")

    def check_overrides(self, names: Sequence[str]) -> None:
        """Raise ``ValueError`` if an override matches none of the layers ``names``."""
        for pattern in self.overrides or {}:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"overrides[{pattern!r}] matches no quantizable layer; the layers are: "
                    f"{', '.join(names) or 'none'}."
                )

    def override_for(self, name: str) -> tuple[bool, Bits | None]:
        """Whether an override matches the layer, and what it says."""
        found: tuple[bool, Bits | None] = (False, None)
        for pattern, value in (self.overrides or {}).items():
            if fnmatchcase(name, pattern):
                found = (True, None if value is None else check_pair(value, f"overrides[{pattern!r}]"))
        return found

    def bits_for(self, name: str, is_edge: bool) -> Bits | None:
        """``(weight_bits, activation_bits)`` of a layer, or None if it stays float."""
        overridden, bits = self.override_for(name)
        if overridden:
            return bits
        if is_edge and self.edge_bits is not None:
            return self.edge_bits, self.edge_bits
        return self.weight_bits, self.activation_bits

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        overrides = {k: v if v is None or isinstance(v, int) else list(v) for k, v in (self.overrides or {}).items()}
        return {**asdict(self), "overrides": overrides}


def check_pair(value: int | Sequence[int], what: str) -> Bits:
    """Return a width or a pair of widths as ``(weight_bits, activation_bits)``.

    Raises:
        ValueError: naming ``what`` and the value.

    Example:
        >>> check_pair(4, "bits"), check_pair([4, 8], "bits")
        ((4, 4), (4, 8))
    """
    if isinstance(value, int):
        return check_bits(value, what), value
    if isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{what} must be a width or a pair (weight_bits, activation_bits), got {value!r}.")
    return check_bits(value[0], what), check_bits(value[1], what)
