"""Projected gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from robustscale.attacks.base import input_gradient
from robustscale.attacks.combining import highest
from robustscale.fields import Pixels, require
from robustscale.noise import Noise
from robustscale.threat import Linf, Threat
from robustscale.types import Score


@dataclass(frozen=True)
class PGD:
    """x ← Π(x + α · ascend(∇ score(x))), K times (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    `ascend` is the sign in ℓ∞ and the unit gradient in ℓ2. Costs K forwards and K input gradients a restart, and
    one forward more a restart if there are several. From a `gaussian` start on `Goal(loss="kl")` it is KL-PGD, TRADES'
    inner maximisation (Zhang et al. 2019, https://arxiv.org/abs/1901.08573); Gairat's GA-PGD is it with a count.

    Use: to train with, and to monitor training; 10 steps for that, 20 and more to judge with.
    Breaks: its step size is fixed and its loss saturates on confident networks, so it overrates defences that mask or
        shrink gradients; a published figure needs AutoAttack (Croce and Hein 2020, https://arxiv.org/abs/2003.01690).
    """

    threat: Threat = Linf()
    steps: int = 10
    step_size: Pixels | None = None
    """α. By default 2.5 · eps / steps (the paper's rule), which is 2/255 at 8/255 and 10 steps."""
    start: Literal["uniform", "gaussian", "none"] = "uniform"
    """uniform in the ball; gaussian: 0.001 · N(0, 1), as TRADES; none: the clean image."""
    restarts: int = 1
    """Each example keeps the restart that ends with the highest score."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps: {self.steps} is below 1; use the objective 'natural' for no attack")
        require(self.restarts >= 1, f"restarts: {self.restarts} is below 1; 1 is a single run")
        require(
            self.step_size is None or self.step_size > 0,
            f"step_size: {self.step_size!r} is not positive; leave it out for 2.5 * eps / steps",
        )

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        streams = (noise.fold("restart", r) if r else noise for r in range(self.restarts))
        return highest(score, (self._ascend(score, x, own, on_step) for own in streams))

    def _ascend(self, score: Score, x: Tensor, noise: Noise, on_step: Callable[[Tensor], None] | None) -> Tensor:
        step_size = 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size
        x_adv = x
        if self.start == "uniform":
            x_adv = self.threat.start(x, noise)
        elif self.start == "gaussian":
            x_adv = self.threat.project(x + 0.001 * noise.normal(*x.shape[1:]), x)
        for _ in range(self.steps):
            grad, _values = input_gradient(score, x_adv)
            x_adv = self.threat.project(x_adv + step_size * self.threat.ascend(grad), x)
            if on_step is not None:
                on_step(x_adv)
        return x_adv.detach()
