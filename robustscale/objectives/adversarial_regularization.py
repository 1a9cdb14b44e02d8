"""Adversarial Regularization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, attacking
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.losses import cross_entropy, kl, symmetric_kl, total_variation
from robustscale.noise import Noise
from robustscale.threat import Linf
from robustscale.types import Attack, Batch, Loss, Objective, Progress


@dataclass(frozen=True)
class AdversarialRegularization(Objective):
    """CE(f(x'), y) + λ · KL(p(x')‖p(x)); the attack ascends the very objective that is trained (MIT thesis, 2019).

    Thesis: λ from 0.1 to 5, ε = 0.03, training attack K = 10, α = 0.007. The inner maximum is over x' alone: p(x) is
    constant there, and needs one forward; K + 3 in all. Gradients of the outer KL flow through both p(x') and p(x).
    `regularizer` puts another divergence in the place of the KL, in the attack too. Neither is on the KL's scale: near
    p(x') = p(x) the symmetric KL is twice the KL, and the total variation up to the square root of half of it.

    Use: as TRADES, when the last point of robustness is worth more than clean accuracy; a large λ bends it that way.
    Breaks: at every λ it gives away clean accuracy for its robustness (thesis, λ = 5: SA .765, RA .539 where TRADES has
        .816, .527), and that RA is PGD-20's at ε = 0.03: the thesis has no figure under AutoAttack.
    """

    attack: Attack = PGD(threat=Linf(0.03), step_size=0.007)
    lam: float = 1.0
    """λ."""
    regularizer: Literal["kl", "total_variation", "symmetric_kl"] = "kl"
    """Between p(x') and p(x). total_variation: half the sum of differences; symmetric_kl: both directions, summed."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(self.lam >= 0, f"lam: {self.lam!r} is negative; the thesis' grid is 0.1 to 5")

    def _divergence(self, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        return {"kl": kl, "total_variation": total_variation, "symmetric_kl": symmetric_kl}[self.regularizer](
            p_logits, q_logits
        )

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            with torch.no_grad():
                reference = f(batch.x)

            def score(x: Tensor) -> Tensor:
                logits = f(x)
                return cross_entropy(logits, batch.y) + self.lam * self._divergence(logits, reference)

            return self.attack(score, batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        clean, adv = model(batch.x), model(x_adv)
        robust, regularizer = cross_entropy(adv, batch.target).mean(), self._divergence(adv, clean).mean()
        metrics = {"robust": robust.detach(), "regularizer": regularizer.detach()}
        return Loss(robust + self.lam * regularizer, metrics)
