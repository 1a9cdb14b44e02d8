"""The worst of several attacks, for each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from robustscale.attacks.combining import Combined, highest
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.noise import Noise
from robustscale.threat import L2
from robustscale.types import Attack, Score


@dataclass(frozen=True)
class WorstOf(Combined):
    """x' = argmax_k score(x'_k) over the attacks, per example: the inner maximum over a union of threat models.

    The "max" strategy of Tramèr and Boneh 2019, https://arxiv.org/abs/1904.13000, section 2, and MAT-Max of Araujo et
    al. 2020, https://arxiv.org/abs/2012.02632. Costs all attacks, and one forward more for each.

    Use: to train or to test against several threat models at once, where each example is to meet its worst.
    Breaks: the score picks one ball's images if its eps is the harsher, so that the others go untrained; scores are
    compared after the attacks, and the highest cross-entropy need not be the one that is misclassified.
    """

    attacks: tuple[Attack, ...] = (PGD(), PGD(L2()))

    def __post_init__(self) -> None:
        require(len(self.attacks) >= 1, "attacks: is empty; give at least one")

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        return highest(
            score,
            (
                attack(score, x, noise=noise.fold("attack", number), on_step=on_step)
                for number, attack in enumerate(self.attacks)
            ),
        )
