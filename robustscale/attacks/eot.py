"""Expectation over transformation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustscale.attacks.base import input_gradient
from robustscale.attacks.combining import Combined
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.noise import Noise
from robustscale.types import Attack, Score


@dataclass(frozen=True)
class EOT(Combined):
    """The attack on E[score(x)], as the mean over n draws of a randomised network: its gradient is the mean of theirs.

    Athalye et al. 2018, https://arxiv.org/abs/1802.00420, section 4.2; n = 20 as AutoAttack's `rand` version. Each call
    of a randomised network makes new draws, so n calls are n draws. The mean is over scores, as AutoAttack's code has
    it, not over logits or probabilities before the loss. Draws are differentiated one by one: the memory is that of a
    single one. Costs n times the attack's forwards and input gradients.

    Use: to attack a network with random layers, whose single gradients point anywhere.
    Breaks: on a network without random layers it is n times the cost for nothing; with heavy noise 20 draws still leave
    a gradient of noise (raise `draws` until the figure stands still), and it helps nothing against vanished gradients.
    """

    attack: Attack = PGD()
    draws: int = 20
    """n."""

    def __post_init__(self) -> None:
        require(self.draws >= 1, f"draws: {self.draws} is below 1; 20 is usual, 1 is the attack alone")

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        return self.attack(lambda x: self._mean(score, x), x, noise=noise, on_step=on_step)

    def _mean(self, score: Score, x: Tensor) -> Tensor:
        """(N,): the mean score; its gradient in x is the mean gradient, though no draw's graph is kept."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return torch.stack([score(x) for _ in range(self.draws)]).mean(0)
        pairs = (input_gradient(score, x) for _ in range(self.draws))
        grad, values = next(pairs)
        for more_grad, more_values in pairs:
            grad, values = grad + more_grad, values + more_values
        # Zero, with the mean gradient as its derivative.
        slope = ((x - x.detach()) * (grad / self.draws)).flatten(1).sum(1)
        return values / self.draws + slope
