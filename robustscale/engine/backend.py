"""One process on its own: the backend of tests, and of a run without a cluster."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LocalBackend:
    """A world of one."""

    rank = 0
    world = 1

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def mean_(self, tensors: list[Tensor]) -> None:
        """The mean over one worker is what it has."""

    def barrier(self) -> None:
        """Nobody to wait for."""
