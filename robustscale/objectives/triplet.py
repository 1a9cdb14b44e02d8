"""TLA, triplet loss adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, Goal, attacking
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.losses import cross_entropy
from robustscale.models.features import features, require_features
from robustscale.noise import Noise
from robustscale.types import Attack, Batch, Loss, Objective, Progress, Setting


@dataclass(frozen=True)
class Triplet(Objective):
    """CE(f(x'), y) + λ₁ · max(0, d(h', h_p) - d(h', h_n) + m) + λ₂ · (‖h'‖ + ‖h_p‖ + ‖h_n‖), d(a, b) = 1 - |cos(a, b)|,
    h the features, p a clean image of x's class, n the nearest clean image of another (Mao et al. 2019, "TLA",
    https://arxiv.org/abs/1909.00900).

    Features are the input of the last linear layer. All are taken from the two forwards of the loss, in training mode:
    K + 2 forwards. p is another image of the class, drawn from those computed at once (a worker's share, or a logical
    shard with deterministic reduction), or x itself where it is alone; n is the one with the largest |cos(h', h_n)|
    among them, and where all are of one class the terms of n vanish. The paper too looks for n in the mini-batch.

    The authors' code looks for n among ten times as many images, draws p from the whole class, and adds a second
    triplet whose p is x with uniform noise of 8/255. Its λ₂ weights the mean over batch and features of h'² + h_p² +
    h_n², inside λ₁; the paper's norms, as written above, are followed here.

    Use: when the features serve more than this classifier: to search, to compare, to tell attacked images apart.
    Breaks: it is no more robust than the AT of its time: 47.41 under AutoAttack on CIFAR-10 where 50.03 was reported
        (WRN-34-10, RobustBench); with few images of a class on a worker p is x itself and n is far.
    """

    attack: Attack = PGD(steps=7, step_size=2 / 255)
    goal: Goal = Goal()
    lam1: float = 2.0
    """λ₁."""
    lam2: float = 1e-3
    """λ₂."""
    margin: float = 0.03
    """m; 0.05 on MNIST."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(self.lam1 >= 0, f"lam1: {self.lam1!r} is negative; 2 is the paper's default")
        require(self.lam2 >= 0, f"lam2: {self.lam2!r} is negative; 0.001 is the paper's default")
        require(0 <= self.margin <= 1, f"margin: {self.margin!r} is outside [0, 1], as angular distances are")

    def require(self, setting: Setting) -> None:
        """Raise InputError where the network has no features."""
        if setting.data is not None and setting.network is not None:
            require_features(setting.network, setting.data)

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            return self.attack(self.goal.score(f, batch.x, batch.y, noise), batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        with features(model) as kept:
            adv = model(x_adv)
            model(batch.x)
        robust = cross_entropy(adv, batch.target).mean()
        anchors, clean = (h.to(robust.dtype) for h in kept)
        positive = _positives(batch.y, Noise.of(at.seed, batch.index, "positive", at.step))
        other = batch.y[:, None] != batch.y
        triplet, norm = _triplet(anchors, clean, positive, other, self.margin)
        metrics = {"robust": robust.detach(), "triplet": triplet.detach(), "norm": norm.detach()}
        return Loss(robust + self.lam1 * triplet + self.lam2 * norm, metrics)


def _positives(y: Tensor, noise: Noise) -> Tensor:
    """(N,): for each image another one of its class, uniformly drawn; itself where there is none."""
    own = torch.eye(len(y), dtype=torch.bool, device=y.device)
    draws = noise.uniform(len(y)).masked_fill(y[:, None] != y, -2).masked_fill(own, -1)
    return draws.argmax(1)


def _triplet(anchors: Tensor, clean: Tensor, positive: Tensor, other: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The mean of the hinge and of the norms. anchors, clean (N, D); other (N, N): where classes differ."""
    # Autocast would round the cosines to 1/256 and worse, beside a margin of 0.03.
    with torch.autocast(anchors.device.type, enabled=False):
        cosine = (F.normalize(anchors) @ F.normalize(clean).T).abs()
    near = cosine.detach().masked_fill(~other, -1).argmax(1)
    there_is = other.any(1)
    # d_p - d_n = cos_n - cos_p.
    excess = cosine.gather(1, near[:, None]) - cosine.gather(1, positive[:, None])
    hinge = (excess.squeeze(1) + margin).clamp_min(0) * there_is
    norms = clean.norm(dim=1)
    return hinge.mean(), (anchors.norm(dim=1) + norms[positive] + norms[near] * there_is).mean()
