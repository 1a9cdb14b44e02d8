"""Standard training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from robustscale.losses import cross_entropy
from robustscale.types import Batch, Loss, Progress


@dataclass(frozen=True)
class Natural:
    """CE(f(x), y), without an attack."""

    def __call__(self, model: nn.Module, batch: Batch, at: Progress) -> Loss:
        value = cross_entropy(model(batch.x), batch.y).mean()
        return Loss(value, {"natural": value.detach()})
