"""One of several attacks, drawn for each batch or for each example."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from robustscale.attacks.combining import Combined, chance, on_rows
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.noise import Noise
from robustscale.threat import L2
from robustscale.types import Attack, Score


@dataclass(frozen=True)
class RandomOf(Combined):
    """x' = A_k(x), k drawn with probabilities w_k / Σ w: MAT-Rand's inner maximisation with two norms.

    Araujo et al. 2020, https://arxiv.org/abs/2012.02632, draw the norm from {2, ∞}, each with 1/2. Here either a batch
    draws (equal in every shard and on every worker) or each example does (from its own stream, so
    what it is batched with changes nothing). Costs one attack; drawn per example, each attack runs on its rows alone
    where the score compares logits with labels, and any other score (TRADES' KL) is given the whole batch by each.

    Use: to train against several threat models at the cost of one attack.
    Breaks: an example meets each attack only now and then, and the one that is worst for it by luck alone; in
    evaluation, where no attack may be left to luck, a draw per batch is one and the same for the whole data set.
    """

    attacks: tuple[Attack, ...] = (PGD(), PGD(L2()))
    per: Literal["batch", "sample"] = "batch"
    """What draws: the whole batch together, or each example."""
    weights: tuple[float, ...] | None = None
    """One for each attack, in proportion to its probability; by default all are equal."""

    def __post_init__(self) -> None:
        require(len(self.attacks) >= 1, "attacks: is empty; give at least one")
        weights = self._weights()
        require(
            len(weights) == len(self.attacks),
            f"weights: {len(weights)} of them for {len(self.attacks)} attacks; give each one",
        )
        require(min(weights) >= 0 and sum(weights) > 0, f"weights: {weights!r} must not be negative, nor all be zero")

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        weights = self._weights()
        # Without the last edge, 1 but for rounding: a draw beyond all others is the last attack's.
        edges = [w / sum(weights) for w in accumulate(weights)][:-1]
        if self.per == "batch":
            number = bisect_right(edges, chance(noise, "choice"))
            own = noise.fold("attack", number)
            return self.attacks[number](score, x, noise=own, on_step=on_step)
        bounds = torch.tensor(edges, device=x.device)
        choice = torch.bucketize(noise.fold("choice").uniform(), bounds, right=True)
        # `nonzero` waits for the device: how many examples drew an attack sets the shape of its batch.
        rows = [(choice == number).nonzero().squeeze(1) for number in range(len(self.attacks))]
        return on_rows(self.attacks, rows, score, x, noise, on_step)

    def outcomes(self) -> tuple[tuple[float, Attack], ...]:
        """(probability, the attack that was drawn). It says what an example costs but where each draws for itself and a
        score is given the whole batch by each attack, which costs more."""
        weights = self._weights()
        return tuple((w / sum(weights), attack) for w, attack in zip(weights, self.attacks, strict=True))

    def _weights(self) -> tuple[float, ...]:
        return (1.0,) * len(self.attacks) if self.weights is None else self.weights
