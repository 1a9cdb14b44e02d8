"""Adversarial training on Carlini and Wagner's margin and on cross entropy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from robustscale.attacks.base import Goal
from robustscale.attacks.pgd import PGD
from robustscale.objectives.mixed import Mixed
from robustscale.types import Attack


@dataclass(frozen=True)
class CwPgd(Mixed):
    """CE(f(x'), y), x' ascending max_{i≠y} z_i - z_y for half of each batch and CE(f(x'), y) for the other half.

    The margin is the one of Carlini and Wagner 2017, https://arxiv.org/abs/1608.04644 (κ = ∞: it keeps growing past
    the boundary), climbed by PGD inside the ball rather than by their search for the nearest misclassified image, as
    Madry et al. 2018 did for their "CW" column. Both halves have the same attack; only what it ascends differs.
    K + 1 forwards' worth of work, as PGD-AT. The outer loss of both halves is the cross entropy.

    Use: where PGD-AT does well under cross-entropy attacks and worse under margin ones, which AutoAttack's are near.
    Breaks: the two losses rank images much alike on a network that is trained adversarially, so the gain over PGD-AT is
    small; the margin's gradient does not fade as an image is lost, so clean accuracy may fall.
    """

    attack: Attack = PGD()

    def sides(self) -> tuple[tuple[Attack, Goal], tuple[Attack, Goal]]:
        return (self.attack, dataclasses.replace(self.goal, loss="margin")), (self.attack, self.goal)
