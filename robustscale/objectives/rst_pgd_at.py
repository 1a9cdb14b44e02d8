"""Robust self-training by adversarial training on projected gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, Goal, attacking
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.threat import Linf
from robustscale.types import Attack, Batch, Loss, Objective, Progress, Setting


@dataclass(frozen=True)
class RstPgdAt(Objective):
    """1/N Σ_i [(1 - β) · a_i · CE(f(x_i), y_i) + β · b_i · CE(f(x'_i), y_i)], x' ascending CE; a_i = 2(1 - a) for
    labelled images and 2a for pseudo-labelled ones, b_i likewise of b (Raghunathan et al. 2020,
    https://arxiv.org/abs/2002.10716).

    a is `unlabelled_natural`, 0.9, b `unlabelled_robust`, 0.5, β = 0.5: the arguments with which the authors' code
    (https://github.com/p-lambda/robust_tradeoff) runs PG-AT + RST. Note that its β is the share of the robust term,
    that of `pgd_at` the share of the clean one. The code divides each term by the sum of its weights over the batch,
    (1 - a) n + a ñ for n labelled and ñ pseudo-labelled images. At its half and half that is N/2, as here; at another
    data.labelled_share this keeps dividing by N/2, so that the loss stays a mean over examples and equal for any
    number of workers.

    Other defaults are the code's too: ε = 0.031, α = 0.007, K = 10, start x + 0.001 · N(0, 1), BatchNorm by its running
    statistics during the attack; half of each batch of 256 (data.labelled_share), cosine schedule, weight decay 5e-4.
    Its epoch counts 50,000 images of both kinds; here one is a pass over the labelled images.

    Use: when clean accuracy must not fall: the clean loss on many unlabelled images holds it up.
    Breaks: where pseudo-labels are poor: at 0.9 the clean term rests on them nine to one.
    """

    attack: Attack = PGD(Linf(0.031), step_size=0.007, start="gaussian")
    goal: Goal = Goal()
    beta: float = 0.5
    """Share of the robust term."""
    unlabelled_natural: float = 0.9
    """a: how far the clean term goes by the pseudo-labelled images; 0 is not at all, 1 by them alone."""
    unlabelled_robust: float = 0.5
    """b: the same of the robust term."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        for name in ("beta", "unlabelled_natural", "unlabelled_robust"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}: {value!r} is outside [0, 1]; 0.5 weighs both sides alike")

    def require(self, setting: Setting) -> None:
        if not setting.unlabelled:
            raise InputError(
                "unlabelled_natural: is of pseudo-labelled images, and the run has none; give data.unlabelled a file "
                "by python -m robustscale.pseudo_label, or take the objective pgd_at"
            )

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            return self.attack(self.goal.score(f, batch.x, batch.y, noise), batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        natural = _weighted(cross_entropy(model(batch.x), batch.target), batch.labelled, self.unlabelled_natural)
        robust = _weighted(cross_entropy(model(x_adv), batch.target), batch.labelled, self.unlabelled_robust)
        metrics = {"natural": natural.detach(), "robust": robust.detach()}
        return Loss((1 - self.beta) * natural + self.beta * robust, metrics)


def _weighted(losses: Tensor, labelled: Tensor, unlabelled: float) -> Tensor:
    return torch.where(labelled, 2 * (1 - unlabelled) * losses, 2 * unlabelled * losses).mean()
