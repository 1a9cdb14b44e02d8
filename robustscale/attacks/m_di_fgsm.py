"""The momentum diverse inputs iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from robustscale.attacks.di_fgsm import DIFGSM
from robustscale.attacks.mi_fgsm import MIFGSM


@dataclass(frozen=True)
class MDIFGSM(DIFGSM):
    """g ← μ g + ∇ / ‖∇‖₁ with ∇ = ∇ score(T(x)), x ← Π(x + α · ascend(g)): M-DI²-FGSM, the two attacks in one.

    Xie et al. 2019, https://arxiv.org/abs/1803.06978, section 3.3; T as in DI²-FGSM, μ = 1 as in MI-FGSM, and all
    that their docstrings say of the authors' codes. torchattacks 3.5.1 has it as DIFGSM(decay=1).
    Costs K forwards and K input gradients.

    Use: to test a network that gives no gradients by way of another one: of the three it transfers best (table 1).
    Breaks: against the network that it is computed on PGD is the better choice: here other images' gradients, and old
    ones, steer the step; adversarially trained targets resist the transfer.
    """

    mu: float = 1.0
    """μ: what is kept of the accumulated gradient; 0 is DI²-FGSM."""

    def _ascent(self) -> MIFGSM:
        return MIFGSM(self.threat, self.steps, self.step_size, self.mu)
