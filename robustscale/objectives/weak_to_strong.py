"""Training in stages, from a weak attack to a strong one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.objectives.pgd_at import PgdAt
from robustscale.types import Batch, Loss, Objective, Progress, Setting


@dataclass(frozen=True)
class WeakToStrong(Objective):
    """One objective after another: the k-th from step u_{k-1} T to u_k T of T, u_0 = 0, the last to the end (Wang et
    al. 2024, https://arxiv.org/abs/2401.04727, "weak-to-strong": PGD-1 to pretrain, PGD-3 to finish).

    The paper's stages are two trainings, with a learning rate each; here they are one, under one schedule. With
    `data.progressive` of the same shares it is their coarse-to-fine as well. Natural training is a stage like any
    other. Costs the mean of the stages, weighted by their shares.

    Use: for long trainings, most of which a weak attack will do for: by the default shares, under two thirds of PGD-3's
        cost.
    Breaks: where the weak stage is long and its ε large, by the catastrophic overfitting of single steps (Wong et al.
    2020, https://arxiv.org/abs/2001.03994); a stage that follows the last drop of the learning rate learns little.
    """

    stages: tuple[Objective, ...] = (PgdAt(FGSM(random_start=True)), PgdAt(PGD(steps=3)))
    """In order; components of any kind of objective."""
    until: tuple[float, ...] = (0.8,)
    """u: share of training at which each stage but the last ends."""

    def __post_init__(self) -> None:
        require(len(self.stages) >= 1, "stages: is empty; give at least one objective")
        require(
            list(self.until) == sorted(set(self.until)) and all(0 < u < 1 for u in self.until),
            f"until: {self.until!r} must rise within (0, 1); they are shares of training",
        )

    def require(self, setting: Setting) -> None:
        """Raise InputError where stages have no end. Not before: options come one by one."""
        require(
            len(self.until) == len(self.stages) - 1,
            f"until: {len(self.until)} of them for {len(self.stages)} stages; give one to each but the last",
        )

    def outcomes(self) -> tuple[tuple[float, Objective], ...]:
        """(share of training, what is then descended)."""
        edges = (0.0, *self.until, 1.0)
        return tuple((edges[k + 1] - edges[k], stage) for k, stage in enumerate(self.stages))

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Any:
        return self.now(at).perturb(model, batch, at)

    def loss(self, model: nn.Module, batch: Batch, found: Any, at: Progress) -> Loss:
        return self.now(at).loss(model, batch, found, at)

    def now(self, at: Progress) -> Objective:
        """The objective of this step."""
        return self.stages[sum(at.step >= round(u * at.total_steps) for u in self.until)]
