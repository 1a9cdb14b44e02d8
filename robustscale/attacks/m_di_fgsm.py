"""The momentum diverse inputs iterative fast gradient sign method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from robustscale.attacks.di_fgsm import Diverse, require_diversity
from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.fields import Pixels
from robustscale.noise import Noise
from robustscale.threat import Linf, Threat
from robustscale.types import Score


@dataclass(frozen=True)
class MDIFGSM:
    """g ← μ g + ∇ / ‖∇‖₁ with ∇ = ∇ score(T(x)), x ← Π(x + α · ascend(g)): M-DI²-FGSM, the two attacks in one.

    Xie et al. 2019, https://arxiv.org/abs/1803.06978, section 3.3; T as in DI²-FGSM, μ = 1 as in MI-FGSM, and all
    that their docstrings say of the authors' codes. torchattacks 3.5.1 has it as DIFGSM(decay=1).
    Costs K forwards and K input gradients.

    Use: to test a network that gives no gradients by way of another one: of the three it transfers best (table 1).
    Breaks: against the network that it is computed on PGD is the better choice: here other images' gradients, and old
    ones, steer the step; adversarially trained targets resist the transfer.
    """

    threat: Threat = Linf()
    steps: int = 10
    step_size: Pixels | None = None
    """α. By default eps / steps."""
    mu: float = 1.0
    """μ: what is kept of the accumulated gradient; 0 is DI²-FGSM."""
    p: float = 0.5
    """Probability that an image is transformed."""
    resize_rate: float = 0.9
    """Smallest side after the resize, as a share of the image's."""

    def __post_init__(self) -> None:
        require_diversity(self.p, self.resize_rate)
        self._ascent()

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        diverse = Diverse(score, noise, self.p, self.resize_rate)
        return self._ascent()(diverse, x, noise=noise, on_step=on_step)

    def _ascent(self) -> MIFGSM:
        """Its checks are ours as well."""
        return MIFGSM(self.threat, self.steps, self.step_size, self.mu)
