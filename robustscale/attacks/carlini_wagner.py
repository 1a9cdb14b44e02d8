"""The smallest perturbation that fools a network, by Carlini and Wagner's ℓ2 attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustscale.attacks.base import input_gradient, score_of
from robustscale.fields import require
from robustscale.noise import Noise
from robustscale.threat import L2, Threat
from robustscale.types import Score

LARGEST = 1e9
"""Of c: where no smaller one succeeds it grows tenfold a search step."""


@dataclass(frozen=True)
class CarliniWagner:
    """min over w of ‖x' - x‖² + c · max(-score(x'), -κ), x' = (1 + tanh w) / 2, by Adam; then a search for c.

    Carlini and Wagner 2017, https://arxiv.org/abs/1608.04644. The score is a margin, positive exactly where the
    network is wrong: `Goal(loss="margin")`, targeted or not. tanh keeps x' in the box without clipping. For each
    example c starts small, grows tenfold until an attack succeeds (score > κ), and is then bisected; of all points of
    all search steps the nearest that succeeds is kept. `find` gives it with its distance, whatever eps is.

    As an attack it answers to the ball: the nearest point found where its distance is within eps, else that point's
    projection on the ball (the last iterate's where none was found). An image is broken at eps if its distance is at
    most eps, or if the projection happens to fool the network as well. Nothing is random. Costs search_steps · steps
    forwards and input gradients at most.

    Defaults are the paper's learning rate and the usual 9 search steps of 1000 iterations; the paper has 20 and
    10,000, its code (carlini/nn_robust_attacks) 9 and 10,000. As there, pixels of exactly 0 and 1 start at
    atanh(±0.999999). Distances are from the image itself, there from its image under tanh. The code ends a search
    step once the loss of the whole batch has not fallen by 0.01 % in a tenth of the iterations; here each example
    ends on its own, or its result would depend on what it is batched with.

    Use: to measure the distance to the decision boundary, at small cost of precision whatever the network's eps.
    Breaks: where pixels are saturated (tanh is flat at 0 and 1, so they leave slowly); at a fixed eps PGD and APGD
    break more images for less, and Athalye et al. 2018, https://arxiv.org/abs/1802.00420, need EOT beside it.
    """

    boundary: ClassVar[bool] = True
    norms: ClassVar[tuple[type[Threat], ...]] = (L2,)

    threat: Threat = L2()
    steps: int = 1000
    """Iterations of Adam a search step."""
    search_steps: int = 9
    """Values of c tried for each example."""
    kappa: float = 0.0
    """κ: the margin, in logits, by which the network must be wrong."""
    c: float = 1e-3
    """The first value of c."""
    lr: float = 0.01
    """Adam's learning rate, in units of w."""
    early_abort: bool = True
    """End an example's search step where the loss fell by less than 0.01 % in steps / 10 iterations."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.threat, self.norms),
            f"threat: {type(self.threat).__name__.lower()}, but this attack minimises the l2 norm; take threat l2, or "
            "pgd with goal.loss margin within linf",
        )
        require(self.steps >= 1, f"steps: {self.steps} is below 1; 1000 is usual")
        require(self.search_steps >= 1, f"search_steps: {self.search_steps} is below 1; 9 is usual")
        require(self.kappa >= 0, f"kappa: {self.kappa!r} is negative; 0 asks for a wrong class, and no more")
        require(0 < self.c <= LARGEST, f"c: {self.c!r} is outside (0, {LARGEST:g}]; the search raises it from 0.001")
        require(self.lr > 0, f"lr: {self.lr!r} is not positive; 0.01 is the paper's")

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        x_adv, distance = self._search(score, x, on_step)
        return self._within(x_adv, distance, x)

    def find(self, score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest point found that succeeds, and its ℓ2 distance (N,): infinite, and some other point, where
        none was found."""
        return self._search(score, x, None)

    def _within(self, x_adv: Tensor, distance: Tensor, x: Tensor) -> Tensor:
        # Not projected where it is inside already: rounding could undo a success by a hair.
        return torch.where(_rows(distance <= self.threat.eps, x), x_adv, self.threat.project(x_adv, x))

    def _search(self, score: Score, x: Tensor, on_step: Callable[[Tensor], None] | None) -> tuple[Tensor, Tensor]:
        x_adv, distance = x, torch.full_like(x.flatten(1)[:, 0], torch.inf)
        low, high, c = (
            torch.zeros_like(distance),
            torch.full_like(distance, torch.inf),
            torch.full_like(distance, self.c),
        )
        for _ in range(self.search_steps):
            found, its_distance = self._descend(score, x, c)
            nearer = (its_distance < distance) | distance.isinf()
            x_adv = torch.where(_rows(nearer, x), found, x_adv)
            distance = torch.minimum(its_distance, distance)
            succeeded = its_distance.isfinite()
            low, high = torch.where(succeeded, low, c), torch.where(succeeded, c, high)
            c = torch.where(high.isinf(), (10 * c).clamp_max(LARGEST), (low + high) / 2)
            if on_step is not None:
                on_step(self._within(x_adv, distance, x))
        return x_adv, distance

    def _descend(self, score: Score, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Adam from the clean image at these values of c; the nearest success, or the last iterate and infinity."""
        rows = torch.arange(len(x), device=x.device)
        nearest, nearest_distance = x, torch.full_like(c, torch.inf)
        run = _Descent(x, c, self.kappa, self.lr)
        part, check, reached = score, -(-self.steps // 10), torch.full_like(c, torch.inf)
        for k in range(1, self.steps + 1):
            x_adv, distance, loss, succeeded = run.step(part, k)
            fits = succeeded & (distance < nearest_distance[rows])
            keep = fits | nearest_distance[rows].isinf()
            nearest = nearest.index_copy(0, rows, torch.where(_rows(keep, x), x_adv, nearest[rows]))
            best = torch.where(fits, distance, nearest_distance[rows])
            nearest_distance = nearest_distance.index_copy(0, rows, best)
            if self.early_abort and k % check == 0 and k < self.steps:
                falling = (loss <= 0.9999 * reached).nonzero().squeeze(1)
                reached = loss
                # The lengths are known to the host once `nonzero` has waited for the device: ten times a search step.
                if len(falling) == 0:
                    break
                if len(falling) < len(rows):
                    rows, reached = rows[falling], reached[falling]
                    run.keep(falling)
                    part = score_of(score, x, rows)
        return nearest, nearest_distance


class _Descent:
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) on w for some examples, each on its own."""

    def __init__(self, x: Tensor, c: Tensor, kappa: float, lr: float) -> None:
        self.x, self.c, self.kappa, self.lr = x, c, kappa, lr
        self.w = ((2 * x - 1) * 0.999999).atanh()
        self.m, self.v = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, score: Score, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x' before step k, its distance, its loss, and whether it succeeds."""
        t = self.w.tanh()
        x_adv = (1 + t) / 2
        grad, margin = input_gradient(score, x_adv)
        delta = x_adv - self.x
        square = delta.flatten(1).square().sum(1)
        grad = 2 * delta - _rows(torch.where(margin < self.kappa, self.c, 0), grad) * grad
        self._adam(grad * (1 - t * t) / 2, k)
        # max(-margin, -κ) + κ: never negative, as a fall by a share of the loss is asked for.
        loss = square + self.c * (self.kappa - margin).clamp_min(0)
        return x_adv, square.sqrt(), loss, margin > self.kappa

    def _adam(self, grad: Tensor, k: int) -> None:
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad * grad
        m, v = self.m / (1 - 0.9**k), self.v / (1 - 0.999**k)
        self.w = self.w - self.lr * m / (v.sqrt() + 1e-8)

    def keep(self, rows: Tensor) -> None:
        self.x, self.c, self.w, self.m, self.v = (each[rows] for each in (self.x, self.c, self.w, self.m, self.v))


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))
