"""ALP, adversarial logit pairing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, Goal, attacking
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.losses import cross_entropy, squared_distance
from robustscale.noise import Noise
from robustscale.types import Attack, Batch, Loss, Objective, Progress


@dataclass(frozen=True)
class Alp(Objective):
    """CE(f(x'), y) + λ · ‖f(x) - f(x')‖² (Kannan et al. 2018, https://arxiv.org/abs/1803.06373).

    The norm is over the logits of an image, and images are averaged, as the paper writes it. The authors' code takes
    the mean over the logits as well: its λ is ours times the number of classes, so that its 0.5 on ImageNet is 0.0005
    here. It descends the cross entropy of clean and adversarial images together (`classify` both), with the labels
    smoothed by 0.1; and where it attacks untargeted it ascends the predicted label's loss, else it descends a random
    or the least likely class's: all of these are a `goal`. Gradients flow through both logits. Takes K + 2 forwards.

    Use: as the plainest way to tie clean and adversarial predictions together, to compare TRADES and MART with.
    Breaks: its loss surface is bumpy, so that few attack steps overrate it: the paper's ImageNet network keeps 0.6 %
        under targeted PGD of up to 1000 steps at 16/255 (Engstrom et al. 2018, https://arxiv.org/abs/1807.10272), and
        on top of adversarial training it adds little (Mosbach et al. 2018, https://arxiv.org/abs/1810.12042).
    """

    attack: Attack = PGD()
    goal: Goal = Goal()
    lam: float = 0.5
    """λ."""
    classify: Literal["adversarial", "clean", "both"] = "adversarial"
    """Whose cross entropy is descended; both: the mean of the two, as the authors' code."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(self.lam >= 0, f"lam: {self.lam!r} is negative; 0.5 is the paper's default")

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            return self.attack(self.goal.score(f, batch.x, batch.y, noise), batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        clean, adv = model(batch.x), model(x_adv)
        natural, robust = cross_entropy(clean, batch.target).mean(), cross_entropy(adv, batch.target).mean()
        pairing = squared_distance(clean, adv).mean()
        classified = {"adversarial": robust, "clean": natural, "both": (natural + robust) / 2}[self.classify]
        metrics = {"natural": natural.detach(), "robust": robust.detach(), "pairing": pairing.detach()}
        return Loss(classified + self.lam * pairing, metrics)
