"""Adversarial training, robust optimisation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, Goal, attacking
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.losses import cross_entropy
from robustscale.noise import Noise, key_of
from robustscale.types import Attack, Batch, Loss, Objective, Progress


@dataclass(frozen=True)
class PgdAt(Objective):
    """β · CE(f(x), y) + (1 - β) · CE(f(x'), y), x' the attack's (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    β = 0 is the paper's min-max. β > 0 mixes in clean images: in every loss, or, with `natural_batches`, as the
    share of whole batches that are natural (the 95 / 5 mix is β = 0.05). The authors attack with BatchNorm in
    training mode, which updates its running statistics K times a step; the default here is `eval`, which
    "Bag of Tricks for AT" (https://arxiv.org/abs/2010.00467) finds equally robust and more accurate.

    Use: as the first robust objective to try, and the baseline of every other.
    Breaks: by robust overfitting: after the first drop of the learning rate test RA falls while training RA rises (Rice
        et al. 2020, https://arxiv.org/abs/2002.11569), so it needs early stopping or averaged weights.
    """

    attack: Attack = PGD()
    goal: Goal = Goal()
    beta: float = 0.0
    natural_batches: bool = False
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(0 <= self.beta <= 1, f"beta: {self.beta!r} is outside [0, 1]; it is the share of the clean loss")

    def outcomes(self) -> tuple[tuple[float, PgdAt], ...]:
        """(probability, the objective of a batch that has drawn its side)."""
        if not self.natural_batches or self.beta in (0, 1):
            return ()
        return (self.beta, replace(self, beta=1.0)), (1 - self.beta, replace(self, beta=0.0))

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        if self._natural_share(at) == 1:
            return batch.x
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            return self.attack(self.goal.score(f, batch.x, batch.y, noise), batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        beta = self._natural_share(at)
        if beta == 1:
            natural = cross_entropy(model(batch.x), batch.target).mean()
            return Loss(natural, {"natural": natural.detach()})
        robust = cross_entropy(model(x_adv), batch.target).mean()
        if beta == 0:
            return Loss(robust, {"robust": robust.detach()})
        natural = cross_entropy(model(batch.x), batch.target).mean()
        return Loss(beta * natural + (1 - beta) * robust, {"natural": natural.detach(), "robust": robust.detach()})

    def _natural_share(self, at: Progress) -> float:
        if not self.natural_batches:
            return self.beta
        # Keyed by the step alone: every worker and shard of a global batch takes the same side.
        return float(key_of(at.seed, "natural_batch", at.step) % 2**32 < self.beta * 2**32)
