"""The first layer of every network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustscale.fields import require


class Normalize(nn.Module):
    """(x - mean) / std per channel. Inside the model, so that eps stays in [0, 1] pixels for every attack.

    `mean` and `std` are buffers: saved with the weights, moved with the module, not trained. Raises InputError
    where their lengths differ or a std is not positive.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        require(len(mean) == len(std), f"mean, std: {len(mean)} and {len(std)} numbers; give one of each a channel")
        require(all(s > 0 for s in std), f"std: {std!r} must be positive; is a channel of the data constant?")
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
