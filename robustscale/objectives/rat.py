"""Randomised adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, Goal, attacking
from robustscale.attacks.pgd import PGD
from robustscale.fields import Pixels, require
from robustscale.losses import cross_entropy
from robustscale.noise import Noise, drawing, next_draw
from robustscale.types import Attack, Batch, Forward, Loss, Objective, Progress


@dataclass(frozen=True)
class Rat(Objective):
    """CE(f(x' + η), y), η ~ N(0, σ²) a pixel, x' by PGD through the noisy network x -> f(x + η), η fresh at each step.

    Araujo et al. 2019 (https://arxiv.org/abs/1903.10219), the noise after Pinot et al. 2019
    (https://arxiv.org/abs/1902.01148). x' stays in ball and box; x' + η is not cut to the box, which would make the
    noise another one near 0 and 1. σ = 0.25 is in [0, 1] pixels. K + 1 forwards. η is keyed by (seed, example, step,
    number of the draw). What is defended is the noisy network: the same noise has to be there at inference,
    as an evaluation under Gaussian noise has it; read without it, the figures are those of another network.

    Use: against ℓ2 and ℓ∞ at once, where a randomised prediction is acceptable, or before randomised smoothing.
    Breaks: an attacker who averages the gradient over many draws (EOT) takes most of the gain over PGD-AT away, and
    σ = 0.25 costs much clean accuracy.
    """

    attack: Attack = PGD()
    goal: Goal = Goal()
    sigma: Pixels = 0.25
    """σ, in [0, 1] pixels."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(self.sigma > 0, f"sigma: {self.sigma!r} is not positive; use pgd_at for no noise")

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f, drawing(noise.fold("eta")):
            noisy = self._noisy(f)
            return self.attack(self.goal.score(noisy, batch.x, batch.y, noise), batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        with drawing(Noise.of(at.seed, batch.index, "eta", at.step)):
            robust = cross_entropy(self._noisy(model)(x_adv), batch.target).mean()
        return Loss(robust, {"robust": robust.detach()})

    def _noisy(self, f: Forward) -> Forward:
        return lambda x: f(x + self.sigma * next_draw(x).normal(*x.shape[1:]))
