"""Standard training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from robustscale.losses import cross_entropy
from robustscale.types import Batch, Loss, Objective, Progress


@dataclass(frozen=True)
class Natural(Objective):
    """CE(f(x), y), without an attack."""

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> None:
        """There is no attack."""

    def loss(self, model: nn.Module, batch: Batch, found: None, at: Progress) -> Loss:
        value = cross_entropy(model(batch.x), batch.target).mean()
        return Loss(value, {"natural": value.detach()})
