"""The fast gradient sign method, from the image or from a random start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from robustscale.attacks.base import input_gradient
from robustscale.fields import require
from robustscale.noise import Noise
from robustscale.threat import Linf, Threat
from robustscale.types import Score


@dataclass(frozen=True)
class FGSM:
    """x' = Π(x + ε · ascend(∇ score(x))) (Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572).

    With `random_start` it is FGSM-RS (Wong et al. 2020, https://arxiv.org/abs/2001.03994): a uniform start in the
    ball, then a step of alpha · ε, alpha = 1.25. Costs one forward and one input gradient.

    Use: for fast training with a random start, and to see the difference to PGD, which tells masked gradients.
    Breaks: as an evaluation always: one step is right only while the loss is linear over the ball; training with it at
        larger ε ends in catastrophic overfitting (Wong et al. 2020).
    """

    threat: Threat = Linf()
    random_start: bool = False
    alpha: float | None = None
    """Step in units of ε; by default 1, or 1.25 from a random start."""

    def __post_init__(self) -> None:
        require(
            self.alpha is None or self.alpha > 0, f"alpha: {self.alpha!r} is not positive; leave it out for 1 or 1.25"
        )

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        alpha = (1.25 if self.random_start else 1.0) if self.alpha is None else self.alpha
        start = self.threat.start(x, noise) if self.random_start else x
        grad, _values = input_gradient(score, start)
        x_adv = self.threat.project(start + alpha * self.threat.eps * self.threat.ascend(grad), x).detach()
        if on_step is not None:
            on_step(x_adv)
        return x_adv
