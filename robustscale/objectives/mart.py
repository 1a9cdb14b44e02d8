"""MART, misclassification-aware adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, Goal, attacking
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.losses import cross_entropy, kl, rival
from robustscale.noise import Noise
from robustscale.types import Attack, Batch, Loss, Objective, Progress


@dataclass(frozen=True)
class Mart(Objective):
    """BCE(f(x'), y) + λ · KL(p(x)‖p(x')) · (1 - p_y(x)), where BCE = CE - log(1 - max_{k≠y} p_k(x')) (Wang et al. 2020,
    https://openreview.net/forum?id=rklOg6EFwS).

    x' ascends the cross entropy, from x + 0.001 · N(0, 1). λ is 5 in the authors' training script for ResNet-18, 6 in
    the one for wide ResNets. Their code bounds two logarithms, log(1.0001 - p + 1e-12) and log(p + 1e-12), and
    multiplies by 1.0000001 - p_y. Here the paper's expressions are computed in log space instead: they and their
    gradients stay finite wherever the logits do, so nothing has to be bounded. Gradients flow through p(x), p(x') and
    the weight 1 - p_y(x), as in their code. Of soft labels the cross entropy takes the probabilities; y itself says
    which class is left out of the maximum and weighs. Takes K + 2 forwards.

    Use: when the images that the network gets wrong deserve more weight than TRADES gives them, at TRADES' price.
    Breaks: part of its gain over TRADES is against PGD alone: the authors' WRN-28-10 with unlabelled data falls from
        the reported 65.04 to 56.29 under AutoAttack, and ResNet-18 without such data has 47.5 there where PGD-AT has
        48.7 (RobustBench).
    """

    attack: Attack = PGD(start="gaussian")
    goal: Goal = Goal()
    lam: float = 5.0
    """λ."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(self.lam >= 0, f"lam: {self.lam!r} is negative; 5 is the paper's default")

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            return self.attack(self.goal.score(f, batch.x, batch.y, noise), batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        clean, adv = model(batch.x), model(x_adv)
        robust = (cross_entropy(adv, batch.target) + rival(adv, batch.y)).mean()
        weight = 1 - (-cross_entropy(clean, batch.y)).exp()
        consistency = (kl(clean, adv) * weight).mean()
        return Loss(robust + self.lam * consistency, {"robust": robust.detach(), "consistency": consistency.detach()})
