"""Adversarial training on FGSM and on PGD."""

from __future__ import annotations

from dataclasses import dataclass

from robustscale.attacks.base import Goal
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.objectives.mixed import Mixed
from robustscale.types import Attack


@dataclass(frozen=True)
class FgsmPgd(Mixed):
    """CE(f(x'), y), x' by FGSM for half of each batch and by PGD for the other half.

    FGSM of Goodfellow et al. 2015 (https://arxiv.org/abs/1412.6572), PGD of Madry et al. 2018
    (https://arxiv.org/abs/1706.06083). At a half it costs about half of PGD-AT's attack: (1 + K) / 2 forwards' worth.

    Use: where PGD-AT is too dear, and single-step training alone would overfit to its own step.
    Breaks: FGSM's half is a weak adversary (Madry et al., section 5): at equal epochs it is less robust than PGD-AT,
    and a large `share` of it invites catastrophic overfitting.
    """

    fgsm: Attack = FGSM()
    """Of the share."""
    attack: Attack = PGD()
    """Of the rest."""

    def sides(self) -> tuple[tuple[Attack, Goal], tuple[Attack, Goal]]:
        return (self.fgsm, self.goal), (self.attack, self.goal)
