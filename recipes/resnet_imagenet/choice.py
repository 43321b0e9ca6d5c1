"""Which of the training images are calibrated on."""

from collections.abc import Sequence

import torch

# All of a larger set would be kept in memory.
MOST_WITHOUT_A_NUMBER = 10_000


def choose_samples(available: int, samples: int | None, seed: int, source: str) -> list[int]:
    """Draw some of the images, in random order; all of them stay in order.

    Args:
        available: Number of images.
        samples: How many to draw; None for all.
        seed: Random seed of the draw.
        source: Where the images are, for messages.

    Raises:
        ValueError: If there are fewer, or all is meant and they are very many.
    """
    if samples is None and available > MOST_WITHOUT_A_NUMBER:
        raise ValueError(
            f"{source} has {available} calibration images, too many to keep in memory; give calibration_samples, "
            "or calibration_set=per_class for one image of each class."
        )
    if samples is not None and not 1 <= samples <= available:
        raise ValueError(
            f"calibration_samples={samples}, but {source} has {available} calibration images; give a number from 1 to "
            f"{available}, or leave it out for all."
        )
    if samples is None or samples == available:
        return list(range(available))
    return _shuffled(available, seed)[:samples]


def choose_per_class(labels: Sequence[int], seed: int) -> list[int]:
    """Draw one image of each class, as the paper does, in random order.

    Args:
        labels: Labels of all images.
        seed: Random seed of the draw.

    Example:
        >>> sorted(choose_per_class([7, 3, 3, 7, 3], 0))
        [0, 4]
    """
    first: dict[int, int] = {}
    for index in _shuffled(len(labels), seed):
        first.setdefault(labels[index], index)
    return list(first.values())


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
