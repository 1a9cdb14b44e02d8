"""One process on its own: the backend of tests, and of a run without a cluster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustscale.engine.updater import Plain
from robustscale.run import Run


class LocalBackend:
    """A world of one."""

    rank = 0
    world = 1

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def updater(self, network: nn.Module, run: Run) -> Plain:
        return Plain("local", network, network, run)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def mean_(self, tensors: list[Tensor]) -> None:
        """The mean over one worker is what it has."""

    def barrier(self) -> None:
        """Nobody to wait for."""
