"""Averages of the weights over training: what is judged and kept, while the optimizer goes on with its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from robustscale.fields import require
from robustscale.types import Averaging


@dataclass(frozen=True)
class Newest(Averaging):
    """w̄ = w: no average.

    Use: to compare with published figures that name no average, and in runs of a few epochs.
    Breaks: the newest weights are those of one noisy step; held-out RA jumps from epoch to epoch at a high rate.
    """

    def share(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        return 1.0


@dataclass(frozen=True)
class EMA(Averaging):
    """w̄ ← d w̄ + (1 - d) w after each step, d = min(decay, (1 + t) / (10 + t)) after t steps.

    Decay 0.995 on CIFAR (Rebuffi et al. 2021, https://arxiv.org/abs/2103.01946), where Gowal et al. 2020
    (https://arxiv.org/abs/2010.03593) found it to raise RA and to delay robust overfitting; 0.9998 on ImageNet. w̄
    begins at the starting weights, and the rise of d lets it forget them. BatchNorm's running statistics are
    averaged like the weights, since they lag behind as the weights do; public code copies the newest ones instead.

    Use: on top of any objective; the average of some hundred steps is more robust at no cost in forwards.
    Breaks: with a large decay in a short run it trails behind: 1 / (1 - decay) steps should be far fewer than all;
    after robust overfitting has set in, it averages overfitted weights.
    """

    decay: float = 0.995

    def __post_init__(self) -> None:
        require(0 < self.decay < 1, f"decay: {self.decay!r} is outside (0, 1); 0.995 on CIFAR, 0.9998 on ImageNet")

    def share(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        return 1 - min(self.decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class SWA(Averaging):
    """w̄ = the mean of the weights at the end of each epoch after `start` (Izmailov et al. 2018,
    https://arxiv.org/abs/1803.05407).

    Up to the first of these epochs w̄ is the newest weights. BatchNorm's statistics are then re-estimated by a pass
    over the training images each epoch, as in the paper: those of the snapshots do not fit the mean of far-apart
    weights. The images are clean, as in the code of Chen et al. 2021 (https://openreview.net/forum?id=qZzy5urZw9), who
    average so in adversarial training from the first drop of the learning rate, here a half; the paper begins at 0.75
    with a constant or cyclic rate. One forward of the training set an epoch.

    Use: with a rate that stays high, in the second half of a long adversarial training.
    Breaks: with a rate that falls to nothing the snapshots are alike and there is nothing to gain; statistics of clean
    images shift a network whose own were of attacked ones, towards SA and away from RA; those of a conditional network
    are re-estimated at its `lam` alone and of a slimmable one at its `width`, so other λ and widths are read worse.
    """

    reestimate: ClassVar[bool] = True

    start: float = 0.5
    """Share of training after which epochs count."""

    def __post_init__(self) -> None:
        require(0 <= self.start < 1, f"start: {self.start!r} is outside [0, 1); it is a share of training")

    def share(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        # The slack: 0.29 · 100 is a little under 29.
        before = math.floor(self.start * total_steps + 1e-9) // steps_per_epoch
        snapshots = step // steps_per_epoch - before
        if snapshots <= 0:
            return 1.0
        return 0.0 if step % steps_per_epoch else 1 / snapshots
