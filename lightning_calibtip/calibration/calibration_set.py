"""The calibration set: a few hundred samples, as batches, with the way a batch goes through the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import keystr as path_name
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from ..batches import batch_size, counted_rows, is_finite, plain
from ..option_fields import require_count

Forward = Callable[[Any, int], Any]
TokenMask = Callable[[Any], Tensor | None]

# Endings of names in a transformers output.
_NOT_LOGITS = ("loss", "past_key_values", "hidden_states", "attentions")


def attention_mask(batch: Any) -> Tensor | None:
    """The ``attention_mask`` of a mapping, bool, shape (batch, positions), or which rows of a graph count, shape
    (rows,), see ``counted_rows``; None if there is neither.

    Args:
        batch: Any batch.

    Example:
        >>> import torch
        >>> attention_mask({"attention_mask": torch.tensor([[1, 0]])})
        tensor([[ True, False]])
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else counted_rows(batch)


class CalibrationSet:
    """Batches that are kept so that each stage can run them again.

    Args:
        forward: ``forward(batch, batch_idx)`` passes a batch through the model and returns the model's output.
        token_mask: ``token_mask(batch)`` says which tokens of a batch count: bool, shape (batch, positions), or
            which of its rows do (nodes of a graph), shape (rows,); None if all do.

    Example:
        >>> import torch
        >>> calibration = CalibrationSet(lambda batch, index: batch * 2)
        >>> calibration.append(torch.ones(2, 1))
        >>> calibration.samples, calibration.run(0).tolist()
        (2, [[2.0], [2.0]])
    """

    def __init__(self, forward: Forward, token_mask: TokenMask = attention_mask) -> None:
        self.forward, self.token_mask = forward, token_mask
        self.batches: list[Any] = []

    def __len__(self) -> int:
        return len(self.batches)

    def append(self, batch: Any, inputs: Any = None) -> None:
        """Keep a batch.

        Args:
            batch: Batch, any nesting of tensors.
            inputs: Part of the batch that the model sees, which must be finite; the whole batch if None.

        Raises:
            ValueError: If it holds no samples, or a tensor of the inputs has a NaN or infinity; the message says which
                batch and which part of it.
        """
        if batch_size(batch) == 0:
            raise ValueError(
                f"Calibration batch {len(self.batches)} holds no samples: leave empty batches out of the dataloader, "
                "and graphs without a node for training."
            )
        leaves, _ = tree_flatten_with_path(plain(batch if inputs is None else inputs, targets=False))
        for path, leaf in leaves:
            if isinstance(leaf, Tensor) and not is_finite(leaf):
                part = f"input{path_name(path)}"
                raise ValueError(
                    f"Calibration batch {len(self.batches)}: {part} (shape {tuple(leaf.shape)}) holds NaN or infinity. "
                    "Clean the data: ranges and reconstruction would be ruined by it."
                )
        self.batches.append(batch)

    def first(self, samples: int) -> "CalibrationSet":
        """The set of its first batches that hold so many samples (the last batch is not cut)."""
        part = CalibrationSet(self.forward, self.token_mask)
        part.batches = list(FirstSamples(self.batches, samples))
        return part

    def run(self, index: int) -> Any:
        """Pass batch ``index`` through the model and return the output."""
        return self.forward(self.batches[index], index)

    def tokens(self, index: int) -> Tensor | None:
        """Which tokens of batch ``index`` count, bool, shape (batch, positions) or (rows,); None if all do."""
        return self.token_mask(self.batches[index])

    @property
    def padded(self) -> bool:
        """Whether any token of any batch does not count."""
        masks = (self.tokens(index) for index in range(len(self)))
        return any(mask is not None and not bool(mask.all()) for mask in masks)

    def require(self) -> None:
        """Raise ``RuntimeError`` if there is no batch."""
        if not self.batches:
            raise RuntimeError("The calibration set is empty: give the Trainer a dataloader with at least one batch.")

    @property
    def samples(self) -> int:
        """Number of samples of all batches, see ``batch_size``."""
        return sum(batch_size(batch) for batch in self.batches)


def named_logits(output: Any) -> list[tuple[str, Tensor]]:
    """The floating-point tensors of a model's output, with their names where it has some.

    From a mapping (such as a transformers output) or a dataclass the loss, a cache, and what was computed on the way
    (hidden states, attention, the encoder's output) are left out.

    Args:
        output: Output of the model.

    Returns:
        Pairs of name and tensor; the name is ``""`` where the output is neither.

    Raises:
        TypeError: If there is no such tensor.

    Example:
        >>> import torch
        >>> [name for name, _ in named_logits({"loss": torch.zeros(1), "logits": torch.zeros(2, 3)})]
        ['logits']
    """
    kind = type(output).__name__
    items: list[tuple[str, Any]] = [("", output)]
    if is_dataclass(output) and not isinstance(output, Mapping | type):
        output = {declared.name: getattr(output, declared.name) for declared in fields(output)}
    if isinstance(output, Mapping):
        items = [
            (str(key), value)
            for key, value in output.items()
            if not str(key).endswith(_NOT_LOGITS) and not str(key).startswith("encoder_")
        ]
    leaves = [(name, leaf) for name, value in items for leaf in tree_leaves(value)]
    logits = [
        (name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim()
    ]
    if not logits:
        raise TypeError(
            f"The model's output ({kind}) holds no logits to compare, which have a dimension of samples (a scalar loss "
            "has none): give your module a method calibration_step(batch, batch_idx) that returns them."
        )
    return logits


def output_logits(output: Any) -> list[Tensor]:
    """The tensors of ``named_logits``.

    Args:
        output: Output of the model.

    Example:
        >>> import torch
        >>> len(output_logits((torch.zeros(2, 3), torch.zeros(2, 4))))
        2
    """
    return [tensor for _, tensor in named_logits(output)]


class FirstSamples:
    """The first batches of a loader, until they hold ``samples`` samples (the last batch is not cut).

    Args:
        loader: Any iterable of batches.
        samples: Number of samples, at least 1.

    Raises:
        ValueError: If ``samples`` is less than 1.

    Example:
        >>> import torch
        >>> [len(batch) for batch in FirstSamples([torch.zeros(4)] * 5, 6)]
        [4, 4]
    """

    def __init__(self, loader: Iterable[Any], samples: int) -> None:
        require_count(samples, "The number of calibration samples")
        self.loader, self.samples = loader, samples

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in self.loader:
            yield batch
            seen += batch_size(batch)
            if seen >= self.samples:
                return
