"""The momentum iterative fast gradient sign method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustscale.attacks.base import input_gradient
from robustscale.fields import Pixels, require
from robustscale.noise import Noise
from robustscale.threat import Linf, Threat
from robustscale.types import Score


@dataclass(frozen=True)
class MIFGSM:
    """g ← μ g + ∇ / ‖∇‖₁, x ← Π(x + α · ascend(g)), K times from the clean image, ∇ = ∇ score(x), α = ε / K.

    Dong et al. 2018, https://arxiv.org/abs/1710.06081, algorithm 1, and section 3.3 for ℓ2. The authors' code
    (dongyp13/Non-Targeted-Adversarial-Attacks) and torchattacks 3.5.1 divide by the mean of |∇| in place of its sum:
    g is larger by the number of pixels, and its direction, all that is used, the same. torchattacks' α is 2/255 for
    ε = 8/255, here `step_size`. foolbox 3.3.4 does not divide at all, so that steps with a large gradient rule;
    the paper is followed. With `mu` 0 it is the iterative FGSM (Kurakin et al. 2017, https://arxiv.org/abs/1607.02533).
    Costs K forwards and K input gradients.

    Use: to make images on one network that fool others too, where the one under attack gives no gradients.
    Breaks: against the network that it is computed on PGD is the better choice, as steps of ε / K from the clean image
    reach the ball's edge only if they never turn; adversarially trained targets resist the transfer (section 4.3).
    """

    from_image: ClassVar[bool] = True
    """Its first gradient is taken at the clean image."""

    threat: Threat = Linf()
    steps: int = 10
    step_size: Pixels | None = None
    """α. By default eps / steps, the paper's."""
    mu: float = 1.0
    """μ: what is kept of the accumulated gradient; 0 forgets it at once."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps: {self.steps} is below 1; 10 is the paper's")
        require(
            self.step_size is None or self.step_size > 0,
            f"step_size: {self.step_size!r} is not positive; leave it out for eps / steps",
        )
        require(self.mu >= 0, f"mu: {self.mu!r} is negative; 1 is the paper's, 0 is no momentum")

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        step_size = self.threat.eps / self.steps if self.step_size is None else self.step_size
        x_adv, g = x, torch.zeros_like(x)
        for _ in range(self.steps):
            grad, _values = input_gradient(score, x_adv)
            g = self.mu * g + _unit_l1(grad)
            x_adv = self.threat.project(x_adv + step_size * self.threat.ascend(g), x)
            if on_step is not None:
                on_step(x_adv)
        return x_adv.detach()


def _unit_l1(grad: Tensor) -> Tensor:
    # The smallest normal float32: a gradient that vanished adds nothing, and a tiny one counts as much as any.
    norm = grad.flatten(1).abs().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return grad / norm.view(-1, *(1,) * (grad.dim() - 1))
