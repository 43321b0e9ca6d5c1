"""One unit, several processes: each works on its share of every mini-batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ranks
from .units import Unit


def share_of_this_rank(index: Tensor) -> tuple[Tensor, float]:
    """The samples of a mini-batch that this rank takes, and the weight of their mean, so that the average over ranks is
    the mean of the whole; fewer samples than ranks are taken by all ranks alike.

    Args:
        index: Positions of the samples, int64, shape (n,), the same on every rank.

    Example:
        >>> share_of_this_rank(torch.arange(3))
        (tensor([0, 1, 2]), 1.0)
    """
    count = ranks.rank_count()
    if count == 1 or len(index) < count:
        return index, 1.0
    share = index[ranks.rank() :: count]
    return share, len(share) * count / len(index)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace gradients by their averages over all ranks.

    Args:
        parameters: Parameters, in the same order on every rank.

    Example:
        >>> average_gradients([torch.ones(1)])
    """
    if (count := ranks.rank_count()) == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    ranks.add_up(gradients)
    torch._foreach_div_(gradients, count)


def deal_units(units: Sequence[Unit], costs: Sequence[float]) -> list[int]:
    """The rank that reconstructs each unit; units that share a quantizer go to the same one, since the first of them
    learns its scale.

    Args:
        units: Units, the same on every rank.
        costs: What each costs, in any unit.

    Example:
        >>> deal_units([], [])
        []
    """
    group_of: dict[int, int] = {}
    # What earlier units share belongs to the group of the first.
    of_unit: list[int] = []
    for position, unit in enumerate(units):
        shared = [id(quantizer) for layer in unit.layers for quantizer in layer.quantizers]
        group = min((group_of[key] for key in shared if key in group_of), default=position)
        joined = {group_of[key] for key in shared if key in group_of}
        of_unit = [group if each in joined else each for each in of_unit] + [group]
        group_of = {key: group if each in joined else each for key, each in group_of.items()}
        group_of |= dict.fromkeys(shared, group)
    groups = sorted(set(of_unit))
    owners = ranks.deal([sum(c for c, each in zip(costs, of_unit, strict=True) if each == group) for group in groups])
    owner_of = dict(zip(groups, owners, strict=True))
    return [owner_of[group] for group in of_unit]
