"""What objectives share that attack one part of a batch in one way, and the rest in another."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, Goal, attacking, score_of
from robustscale.fields import require
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.types import Attack, Batch, Loss, Objective, Progress

_NONE = 1e-12
"""A share that gives no image of any batch to its side."""


@dataclass(frozen=True)
class Mixed(Objective):
    """CE(f(x'), y), x' by one attack for a share of the batch and by another for the rest; one forward for both.

    Sides go by position, interleaved: example i is on the first one where ⌊(i + 1) · share⌋ > ⌊i · share⌋. So every
    batch has its share to within one example, every example takes both sides as the order changes from epoch to epoch,
    and workers agree on the sides with one process wherever share × (examples of a shard) is a whole number: at a half,
    where shards are even. With `reduction: deterministic` the position is the one within the shard.
    """

    goal: Goal = Goal()
    share: float = 0.5
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched. Each side is a batch of its own there."""

    def __post_init__(self) -> None:
        require(0 < self.share < 1, f"share: {self.share!r} is outside (0, 1); 0.5 is half of each batch")

    @abstractmethod
    def sides(self) -> tuple[tuple[Attack, Goal], tuple[Attack, Goal]]:
        """Attack and goal of the share, and of the rest."""

    def outcomes(self) -> tuple[tuple[float, Mixed], ...]:
        """(share, the objective with all images on that side)."""
        if not _NONE < self.share < 1 - _NONE:
            return ()
        return (self.share, replace(self, share=1 - _NONE)), (1 - self.share, replace(self, share=_NONE))

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        x_adv = batch.x
        with attacking(model, self.batchnorm) as f:
            for (attack, goal), rows in zip(self.sides(), self._rows(batch), strict=True):
                if len(rows) > 0:
                    score = score_of(goal.score(f, batch.x, batch.y, noise), batch.x, rows)
                    found = attack(score, batch.x[rows], noise=noise.rows(rows))
                    x_adv = x_adv.index_copy(0, rows, found)
        return x_adv

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        robust = cross_entropy(model(x_adv), batch.target).mean()
        return Loss(robust, {"robust": robust.detach()})

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        # The slack: 0.1 · 30 is a little over 3 in float64, and 0.1 · 3 · 10 a little under.
        edges = (torch.arange(len(batch.y) + 1, dtype=torch.float64) * self.share + 1e-9).floor()
        first = edges.diff() > 0
        # Found on the CPU, from the batch's size alone: the attack waits for nothing of the device.
        device = batch.x.device
        return first.nonzero().flatten().to(device), (~first).nonzero().flatten().to(device)
