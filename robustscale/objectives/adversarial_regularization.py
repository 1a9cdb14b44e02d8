"""Adversarial Regularization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, attacking
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.losses import cross_entropy, kl
from robustscale.noise import Noise
from robustscale.threat import Linf
from robustscale.types import Attack, Batch, Loss, Objective, Progress


@dataclass(frozen=True)
class AdversarialRegularization(Objective):
    """CE(f(x'), y) + λ · KL(p(x')‖p(x)); the attack ascends the very objective that is trained (MIT thesis, 2019).

    Thesis: λ from 0.1 to 5, ε = 0.03, training attack K = 10, α = 0.007. The inner maximum is over x' alone: p(x) is
    constant there, and needs one forward. Gradients of the outer KL flow through both p(x') and p(x).
    """

    attack: Attack = PGD(threat=Linf(0.03), step_size=0.007)
    lam: float = 1.0
    """λ."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(self.lam >= 0, f"lam: {self.lam!r} is negative; the thesis' grid is 0.1 to 5")

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            with torch.no_grad():
                reference = f(batch.x)

            def score(x: Tensor) -> Tensor:
                logits = f(x)
                return cross_entropy(logits, batch.y) + self.lam * kl(logits, reference)

            return self.attack(score, batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        clean, adv = model(batch.x), model(x_adv)
        robust, regularizer = cross_entropy(adv, batch.target).mean(), kl(adv, clean).mean()
        metrics = {"robust": robust.detach(), "regularizer": regularizer.detach()}
        return Loss(robust + self.lam * regularizer, metrics)
