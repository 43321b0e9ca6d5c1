"""A model of two layers that read the very same tensor."""

import torch
from torch import Tensor, nn


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return self.left(x) * self.right(x)
