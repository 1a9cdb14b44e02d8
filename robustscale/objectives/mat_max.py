"""Mixed adversarial training, the worse of two norms."""

from __future__ import annotations

from dataclasses import dataclass

from robustscale.attacks.pgd import PGD
from robustscale.attacks.worst_of import WorstOf
from robustscale.objectives.pgd_at import PgdAt
from robustscale.threat import L2
from robustscale.types import Attack


@dataclass(frozen=True)
class MatMax(PgdAt):
    """CE(f(x'), y), x' the one of two with the larger loss, by PGD in ℓ∞ and in ℓ2, image by image (Araujo et al. 2020,
    https://arxiv.org/abs/2012.02632, "MAT-Max").

    Both eps are given, by CIFAR-10's conventions: 8/255 and 128/255. It is PGD-AT with another attack: 2K + 2 forwards
    to attack, one of them a norm to compare, and one for the loss.

    Use: against ℓ∞ and ℓ2 together where twice the price of PGD-AT may be paid.
    Breaks: the norm whose ball is larger for this network wins for nearly every image, and the other one is hardly
    trained: the balls must be of like strength.
    """

    attack: Attack = WorstOf((PGD(), PGD(threat=L2())))
