"""MixUp and CutMix: every training image is mixed with another of its logical shard, and its target likewise.

MixUp (Zhang et al. 2018, https://arxiv.org/abs/1710.09412): x = λ x1 + (1 - λ) x2. CutMix (Yun et al. 2019,
https://arxiv.org/abs/1905.04899): x is x1 but for a box of x2 that covers 1 - λ of it. Both: λ ~ Beta(α, α), and the
target is λ y1 + (1 - λ) y2, so that the cross-entropy is λ CE(y1) + (1 - λ) CE(y2).

A mix is a function of (seed, step, example) and of the examples of its shard, so the number of workers changes none.
Where this differs from the authors' code, which draws one λ and one box for a whole minibatch and partners over all of
it: here every image has a λ and a box of its own, and a partner of its shard, of its kind where some are
pseudo-labelled (so that losses which weigh the kinds apart still do). As theirs, a partner may be the image itself:
1 in as many as the shard has images.

`Batch.y`, which attacks ascend and margins and counts are of, becomes the dominant label: y1 if λ >= 1/2, else y2. An
attack's task is to have the image taken for something else, which takes a class to leave; objectives whose attack knows
no label (TRADES) are not concerned. Published code differs: Rebuffi et al. 2021 (https://arxiv.org/abs/2103.01946) with
CutMix, and Singh et al. 2023 (https://arxiv.org/abs/2303.01870) with both, ascend the cross-entropy to the mixed
target; the latter judge an attack's success by the dominant label, as here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustscale.fields import require
from robustscale.noise import Noise
from robustscale.types import Batch, Progress, Share

TRIES = 32
"""Of a draw from Beta(α, α): all fail once in 2^32 times at α = 1, and less often below."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Each training image is mixed with another, and so is its target; attacks are given the dominant label."""

    mixup: float = 0.0
    """α of MixUp, λ ~ Beta(α, α); 0 is no MixUp. 0.1 to 0.4 on ImageNet and 1 on CIFAR in its paper; 0.8 is usual for
    transformers."""
    cutmix: float = 0.0
    """α of CutMix; 0 is no CutMix. 1 in its paper."""
    share: float = 1.0
    """Of the images, that are mixed at all; CutMix's authors take 0.5 on CIFAR."""
    switch: float = 0.5
    """Of those that are mixed, by CutMix; where both are on."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            require(
                alpha == 0 or 0.05 <= alpha <= 1,
                f"{name}: {alpha!r} is neither 0, which is none, nor in [0.05, 1]; 0.2 and 1 are usual",
            )
        for name in ("share", "switch"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}: {value!r} is outside [0, 1]; it is a share of the images")

    @property
    def on(self) -> bool:
        return self.share > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def shares(self) -> tuple[float, float]:
        """Of the images, by MixUp and by CutMix."""
        cut = self.switch if self.mixup and self.cutmix else float(self.cutmix > 0)
        return self.share * (1 - cut), self.share * cut


def mixed(share: Share, mix: Mix, classes: int, at: Progress) -> Share:
    """With images, targets and labels of two each; `labelled` and `index` stay the first one's."""
    if not mix.on:
        return share
    batch = share.batch
    noise = Noise.of(at.seed, batch.index, "mix", at.step)
    other = batch.rows(partners(share, noise.fold("partner")))
    by_mixup, by_cutmix = mix.shares
    lot = noise.fold("kind").uniform()
    x, lam = batch.x, torch.ones_like(lot, dtype=torch.float64)
    if by_mixup > 0:
        lam = torch.where(lot < by_mixup, beta(noise.fold("mixup"), mix.mixup), lam)
        # Rounding might lead out of [0, 1], which attacks rely on.
        x = torch.lerp(other.x, x, lam.to(x.dtype)[:, None, None, None]).clamp_(0, 1)
    if by_cutmix > 0:
        cut = (lot >= by_mixup) & (lot < by_mixup + by_cutmix)
        inside = boxes(noise.fold("cutmix"), mix.cutmix, *x.shape[2:]) & cut[:, None, None]
        x = torch.where(inside[:, None], other.x, x)
        # As in the authors' code, the share that is there: the box was rounded, and reaches over the edge.
        lam = torch.where(cut, 1 - inside.double().mean((1, 2)), lam)
    own, its = (target_of(b, classes) for b in (batch, other))
    target = torch.lerp(its, own, lam.to(own.dtype)[:, None])
    return share._replace(batch=batch._replace(x=x, y=torch.where(lam >= 0.5, batch.y, other.y), target=target))


def target_of(batch: Batch, classes: int) -> Tensor:
    """(N, classes) probabilities."""
    return batch.target if batch.target.is_floating_point() else F.one_hot(batch.target, classes).float()


def partners(share: Share, noise: Noise) -> Tensor:
    """(N,) row of each image's partner: a random permutation of each kind in each logical shard."""
    device = share.batch.y.device
    sizes = torch.tensor(share.sizes)
    shard = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
    group = 2 * shard + ~share.batch.labelled
    drawn = noise.keys.argsort(stable=True)
    drawn = drawn[group[drawn].argsort(stable=True)]
    place = group.argsort(stable=True).argsort()
    return drawn[place]


def beta(noise: Noise, alpha: float) -> Tensor:
    """(N,) float64 from Beta(α, α), α <= 1: X / (X + Y) for X = U^(1/α), Y = V^(1/α) under X + Y <= 1 (Jöhnk 1964)."""
    # Shifted by half a step: not 0, of which two would have no quotient.
    draws = noise.uniform(TRIES, 2).double() + 2.0**-25
    tries = draws.pow(1 / alpha)
    first = (tries.sum(2) <= 1).to(torch.uint8).argmax(1)
    x, y = tries[torch.arange(len(tries), device=tries.device), first].unbind(1)
    return x / (x + y)


def boxes(noise: Noise, alpha: float, height: int, width: int) -> Tensor:
    """(N, H, W) bool: a box of sides H √(1 - λ) and W √(1 - λ), as the authors' code rounds them, around a uniform
    centre, as far as it is in the image."""
    ratio = (1 - beta(noise.fold("lambda"), alpha)).sqrt()

    def within(name: str, size: int) -> Tensor:
        half = (size * ratio).long() // 2
        centre, place = noise.fold(name).below(size), torch.arange(size, device=half.device)
        return (place >= (centre - half)[:, None]) & (place < (centre + half)[:, None])

    return within("row", height)[:, :, None] & within("column", width)[:, None, :]
