"""GAIRAT, geometry-aware instance-reweighted adversarial training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, attacking
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.threat import Linf
from robustscale.types import Attack, Batch, Forward, Loss, Objective, Progress, Setting


class Counted(NamedTuple):
    """What GA-PGD finds."""

    x_adv: Tensor
    kappa: Tensor
    """(N,) int64: at how many of the K steps, each before it is made, x' was still classified as y."""
    steps: int
    """K."""


@dataclass(frozen=True)
class Gairat(Objective):
    """Σ ω · CE(f(x'), y) / Σ ω, ω = (1 + tanh(Λ + 5(1 - 2κ/K)))/2, κ of K attack steps at which x' was still
    classified as y (Zhang et al. 2021, https://arxiv.org/abs/2010.01736).

    GA-PGD is PGD that counts κ: its images are PGD's, and the count is read off the logits of the very forwards that
    PGD makes, so there is no other attack here, no further forward, and nothing waits for the device. The attack
    ascends the cross entropy. K + 1 forwards.

    Σ runs over the examples that are computed at once: a worker's share of the batch, or a logical shard with
    deterministic reduction, whose result is therefore the same for any number of workers. The authors' code sums over
    the whole batch of 128 images. It counts epochs from 1 and weights from the 60th of 120 on, here from the 61st; the
    later branches of its Λ schedule are never reached. With an odd K it rounds K / 2 down, here not.

    Use: to see what weighting by the distance to the decision boundary does; κ itself tells easy images from hard ones.
    Breaks: much of the gain is to PGD alone, since the weights shrink the margins of far images: PGD on scaled logits
        takes the authors' CIFAR-10 network from 55 % to 44 % (Hitaj et al. 2021, https://arxiv.org/abs/2103.01914);
        with 500,000 unlabelled images it has 59.64 under AutoAttack (RobustBench) where RST, its base, has 59.53.
    """

    attack: Attack = PGD(Linf(0.031), step_size=0.007)
    """PGD without restarts: what is counted are its steps."""
    lam: tuple[tuple[float, float | None], ...] = ((0.0, None), (0.5, -1.0))
    """(share of training from which it holds, Λ), ...; Λ none is +∞, which weights all images equally: plain
    adversarial training."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        starts = [start for start, _lam in self.lam]
        require(
            starts[:1] == [0] and all(a < b < 1 for a, b in pairwise(starts)),
            f"lam: starts {starts} will not do; the first is 0.0, and the others rise below 1",
        )
        require(
            all(lam is None or math.isfinite(lam) for _start, lam in self.lam),
            f"lam: {self.lam!r} is not finite; none is +infinity",
        )

    def require(self, setting: Setting) -> None:
        """Raise InputError where the attack's score calls are not its steps."""
        name = type(self.attack).__name__
        require(
            isinstance(self.attack, PGD),
            f"attack: kappa counts the steps of PGD, each of which asks the score once; {name} is not PGD; take pgd",
        )
        restarts = getattr(self.attack, "restarts", 1)
        require(
            restarts == 1,
            f"attack.restarts: {restarts} runs would be counted as one, of another image than is kept; take 1",
        )

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Counted:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            score = _Counting(f, batch.y)
            x_adv = self.attack(score, batch.x, noise=noise)
        return Counted(x_adv, score.kappa, score.steps)

    def loss(self, model: nn.Module, batch: Batch, found: Counted, at: Progress) -> Loss:
        losses = cross_entropy(model(found.x_adv), batch.target)
        kappa = found.kappa.to(losses.dtype)
        value = (self._weights(kappa, found.steps, at) * losses).sum()
        return Loss(value, {"robust": losses.detach().mean(), "kappa": kappa.mean()})

    def _weights(self, kappa: Tensor, steps: int, at: Progress) -> Tensor:
        """ω / Σ ω."""
        lam = next(lam for start, lam in reversed(self.lam) if at.step >= round(start * at.total_steps))
        if lam is None:
            return torch.full_like(kappa, 1 / len(kappa))
        # ω = sigmoid(2z). Its quotients are taken in log space: below Λ = -9 all of ω may round to 0.
        z = lam + 5 * (1 - 2 * kappa / steps)
        return F.logsigmoid(2 * z).softmax(0)


class _Counting:
    """The cross entropy, which counts how often it found x' classified as y."""

    def __init__(self, f: Forward, y: Tensor) -> None:
        self.f, self.y, self.kappa, self.steps = f, y, torch.zeros_like(y), 0

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.f(x)
        self.kappa += logits.argmax(1) == self.y
        self.steps += 1
        return cross_entropy(logits, self.y)
