"""Standard training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from robustscale.losses import cross_entropy
from robustscale.types import Batch, Loss, Objective, Progress


@dataclass(frozen=True)
class Natural(Objective):
    """CE(f(x), y), the cross entropy of the images as they are: empirical risk minimisation, without an attack.

    Use: for the clean accuracy that robust training is measured against, and as a first run of new data.
    Breaks: against any white-box attack: at 8/255 PGD leaves next to nothing (Madry et al. 2018, 3.5 % on CIFAR-10).
    """

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> None:
        """There is no attack."""

    def loss(self, model: nn.Module, batch: Batch, found: None, at: Progress) -> Loss:
        value = cross_entropy(model(batch.x), batch.target).mean()
        return Loss(value, {"natural": value.detach()})
