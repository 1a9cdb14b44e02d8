"""Fixed shares of every batch to different attacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

from torch import Tensor

from robustscale.attacks.combining import Combined, chance, on_rows
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.noise import Noise
from robustscale.types import Attack, Score


@dataclass(frozen=True)
class Mixture(Combined):
    """x' = A_k(x) for a share s_k of the batch, exactly; Σ s_k = 1.

    Exact means that of n examples floor or ceil of s_k n go to attack k, by lot among those that the attack is given
    together: a worker's part of the batch, or with reduction `deterministic` a logical shard. So what an example gets
    depends on its batch, which is true of no other attack here. Where it must not, take RandomOf with per `sample`
    and the shares as weights: each example draws for itself, and a share holds on average only (of 128 examples at
    1/2, 64 ± 6). All attacks ascend the same score. Costs one attack where the score compares logits with labels: each
    runs on its rows alone, with no wait for the device. Any other score (TRADES' KL) is given the whole batch by each.

    Use: to train on a fixed mix of attacks, as half of each batch by FGSM and half by PGD.
    Breaks: with reduction `fast` another number of workers draws other lots; an example meets the hardest attack only
    in its share of the epochs, so that robustness to it is below that of WorstOf.
    """

    whole_batch: ClassVar[bool] = True
    """What an example gets depends on the others of its batch."""

    attacks: tuple[Attack, ...] = (FGSM(), PGD())
    shares: tuple[float, ...] | None = None
    """Of the batch, one for each attack, adding up to 1; by default all are equal."""

    def __post_init__(self) -> None:
        require(len(self.attacks) >= 1, "attacks: is empty; give at least one")
        shares = self._shares()
        require(
            len(shares) == len(self.attacks),
            f"shares: {len(shares)} of them for {len(self.attacks)} attacks; give each one",
        )
        require(min(shares) >= 0, f"shares: {shares!r} must not be negative")
        require(abs(sum(shares) - 1) < 1e-6, f"shares: {shares!r} add up to {sum(shares):.6g}; they must add up to 1")

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        return on_rows(self.attacks, split(noise, self._shares()), score, x, noise, on_step)

    def outcomes(self) -> tuple[tuple[float, Attack], ...]:
        """(share, attack): what an example costs where each attack runs on its rows alone. A score that is given the
        whole batch by each costs more."""
        return tuple(zip(self._shares(), self.attacks, strict=True))

    def _shares(self) -> tuple[float, ...]:
        return (1 / len(self.attacks),) * len(self.attacks) if self.shares is None else self.shares


def split(noise: Noise, shares: Sequence[float]) -> list[Tensor]:
    """The rows (indices, rising) of each share of the batch, by lot: floor or ceil of share · n of them.

    Which of the two is a draw as well, so that over many batches, even of one example, the shares hold.
    """
    n = len(noise.keys)
    lot = noise.fold("lot").uniform().argsort(stable=True)
    draw = chance(noise, "round")
    # Rounded first: 0.1 + 0.2 of 10 examples are 3, not 3 and a little.
    inner = [math.floor(round(total * n, 6) + draw) for total in accumulate(shares[:-1])]
    return [lot[low:high].sort().values for low, high in pairwise([0, *inner, n])]
