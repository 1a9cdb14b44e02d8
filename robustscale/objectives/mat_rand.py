"""Mixed adversarial training, one norm at random."""

from __future__ import annotations

from dataclasses import dataclass

from robustscale.attacks.pgd import PGD
from robustscale.attacks.random_of import RandomOf
from robustscale.objectives.pgd_at import PgdAt
from robustscale.threat import L2
from robustscale.types import Attack


@dataclass(frozen=True)
class MatRand(PgdAt):
    """CE(f(x'), y), x' by PGD in ℓ_p, p drawn from {2, ∞} for each batch (Araujo et al. 2020,
    https://arxiv.org/abs/2012.02632, "MAT-Rand").

    Both eps are given, by CIFAR-10's conventions: 8/255 and 128/255. It is PGD-AT with another attack: K + 1 forwards.
    `--objective.attack.per sample` draws p for each image instead.

    Use: against ℓ∞ and ℓ2 together at the price of one of them.
    Breaks: in each norm it stays below training in that norm alone, and says nothing of a third one.
    """

    attack: Attack = RandomOf((PGD(), PGD(threat=L2())))
