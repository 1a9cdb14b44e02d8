"""Auto-PGD: projected ascent whose step size follows from how the score rises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustscale.attacks.base import input_gradient
from robustscale.fields import require
from robustscale.noise import Noise
from robustscale.threat import Linf, Threat
from robustscale.types import Score


@dataclass(frozen=True)
class APGD:
    """z = Π(x_k + η · ascend(∇ score(x_k))), x_{k+1} = Π(x_k + α (z - x_k) + (1 - α) (x_k - x_{k-1})).

    Croce and Hein 2020, https://arxiv.org/abs/2003.01690, algorithm 1: η starts at 2 ε, per example. At checkpoint j,
    of iteration w_j = ceil(p_j · steps), p = 0, 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), η is halved
    and the example goes back to its best point if

    1. fewer than ρ (w_j - w_{j-1}) of the steps since the last checkpoint raised the score, or
    2. η was not halved at the last checkpoint, and the best score has not risen since.

    Returns the point with the highest score met. Which score makes which attack: `Goal(loss="cross_entropy")` APGD-CE,
    `Goal(loss="dlr")` APGD-DLR; APGD-T is the targeted dlr for the nine likeliest targets in turn, which
    `Attacker(APGD(), Goal(loss="dlr"), targets=9)` enumerates. The authors' code returns, instead of the best point, a
    misclassified one where it met any; a score cannot tell them apart, so `judge` looks at every point it is asked for
    (`visited`). Costs steps + 1 forwards and steps input gradients a restart, with no wait for the device.

    Of the authors' code (fra31/auto-attack, autopgd_base.py), which made the published figures, this follows:
    condition 1 reads "at most ρ", not "fewer"; after a return to the best point the next step still counts as rising
    if it scores above the point left. And not: it compares the score of the first step with 0 in place of the
    start's; its checkpoints are sums of rounded-down windows, other than the paper's unless steps is a multiple of
    100; its ℓ2 projection scales and then clips; its start is stretched to the ball's surface.

    Two steps from the image (`steps` 2, `start` none) are APGD-2, what Singh et al. 2023
    (https://arxiv.org/abs/2303.01870) train with on ImageNet: a step of 2 ε that the ball cuts to its corner, and one
    of ε or 2 ε; the better of the three points.

    Use: to measure robustness without a step size to choose; with dlr and targets it is AutoAttack's strongest part;
        with 2 or 3 steps, to train with.
    Breaks: on networks whose gradients are useless or random, where only a gradient-free attack or EOT tells (Athalye
    et al. 2018, https://arxiv.org/abs/1802.00420); with the steps that measuring takes it is too dear to train against.
    """

    visited: ClassVar[bool] = True
    keeps_best: ClassVar[bool] = True
    """No image ends with a lower score than any it was seen with."""

    threat: Threat = Linf()
    steps: int = 100
    restarts: int = 1
    """Each example keeps the restart with the highest score."""
    rho: float = 0.75
    """ρ: share of the steps that must raise the score for η to stay."""
    momentum: float = 0.75
    """α: share of the new step; the rest is the last one's. The first step has none."""
    start: Literal["uniform", "none"] = "uniform"
    """uniform in the ball; none: the clean image."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps: {self.steps} is below 1; 100 is the paper's")
        require(self.restarts >= 1, f"restarts: {self.restarts} is below 1; 1 is a single run")
        require(0 <= self.rho <= 1, f"rho: {self.rho!r} is outside [0, 1]; it is a share of the steps")
        require(0 < self.momentum <= 1, f"momentum: {self.momentum!r} is outside (0, 1]; 1 is no momentum")

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        best, best_value = self._ascend(score, x, noise, on_step)
        for restart in range(1, self.restarts):
            x_adv, value = self._ascend(score, x, noise.fold("restart", restart), on_step)
            best = torch.where(_rows(value > best_value, x), x_adv, best)
            best_value = torch.maximum(value, best_value)
        return best

    def _ascend(
        self, score: Score, x: Tensor, noise: Noise, on_step: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, Tensor]:
        """The best point of one run, and its score."""
        x_adv = previous = x.detach() if self.start == "none" else self.threat.start(x, noise)
        grad, value = input_gradient(score, x_adv)
        best, best_grad, best_value = x_adv, grad, value
        eta = torch.full_like(value, 2 * self.threat.eps)
        rises, halved, at_checkpoint = torch.zeros_like(value), torch.ones_like(value, dtype=torch.bool), value
        windows = checkpoints(self.steps)
        for k in range(1, self.steps + 1):
            x_adv, previous = self._step(x_adv, previous, grad, eta, x, 1.0 if k == 1 else self.momentum), x_adv
            grad, new = input_gradient(score, x_adv) if k < self.steps else (grad, _value(score, x_adv))
            rises, value = rises + (new > value), new
            better = value > best_value
            best = torch.where(_rows(better, x), x_adv, best)
            best_grad = torch.where(_rows(better, x), grad, best_grad)
            best_value = torch.maximum(value, best_value)
            if on_step is not None:
                on_step(x_adv)
            if k in windows:
                halved = (rises <= self.rho * windows[k]) | (~halved & (best_value <= at_checkpoint))
                eta = torch.where(halved, eta / 2, eta)
                x_adv = torch.where(_rows(halved, x), best, x_adv)
                grad = torch.where(_rows(halved, x), best_grad, grad)
                rises, at_checkpoint = torch.zeros_like(rises), best_value
        return best, best_value

    def _step(self, x_adv: Tensor, previous: Tensor, grad: Tensor, eta: Tensor, x: Tensor, alpha: float) -> Tensor:
        z = self.threat.project(x_adv + _rows(eta, x) * self.threat.ascend(grad), x)
        return self.threat.project(x_adv + alpha * (z - x_adv) + (1 - alpha) * (x_adv - previous), x)


def checkpoints(steps: int) -> dict[int, int]:
    """Iteration w_j of each checkpoint, and the number of steps since the one before it."""
    # In whole percent: sums of 0.06 would put a checkpoint one step late.
    percents = [0, 22]
    while percents[-1] < 100:
        percents.append(percents[-1] + max(percents[-1] - percents[-2] - 3, 6))
    points = sorted({-(-p * steps // 100) for p in percents if p <= 100})
    return {w: w - before for before, w in pairwise(points)}


@torch.no_grad()
def _value(score: Score, x: Tensor) -> Tensor:
    """Of the last point, whose gradient nothing asks for: in an attack of two steps that is a third of all backward
    passes."""
    return score(x)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))
