"""Adversarial training as a regulariser, with one gradient step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, Goal, attacking
from robustscale.attacks.fgsm import FGSM
from robustscale.fields import require
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.types import Attack, Batch, Loss, Objective, Progress


@dataclass(frozen=True)
class FgsmRegularization(Objective):
    """a · CE(f(x), y) + (1 - a) · CE(f(x'), y), x' by FGSM (Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572).

    Use: when robustness to a small ε has to come at about three times the cost of natural training.
    Breaks: at larger ε by catastrophic overfitting: within an epoch the network learns to mask its gradient at x, FGSM
        fails and PGD takes everything (Wong et al. 2020, https://arxiv.org/abs/2001.03994); a random start delays it.
    """

    attack: Attack = FGSM()
    goal: Goal = Goal()
    a: float = 0.5
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(0 <= self.a < 1, f"a: {self.a!r} is outside [0, 1); it is the share of the clean loss")

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            return self.attack(self.goal.score(f, batch.x, batch.y, noise), batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        natural = cross_entropy(model(batch.x), batch.target).mean()
        robust = cross_entropy(model(x_adv), batch.target).mean()
        return Loss(self.a * natural + (1 - self.a) * robust, {"natural": natural.detach(), "robust": robust.detach()})
