"""Randomised smoothing (Cohen et al. 2019, https://arxiv.org/abs/1902.02918): g(x) = argmax_c P[f(x + η) = c],
η ~ N(0, σ² I). If P[f(x + η) = c] >= p > 1/2, then g(x + δ) = c for every ‖δ‖₂ < σ Φ⁻¹(p).
`python -m robustscale.certify RUN --sigma 0.25`: N0 = 100, N = 100,000, α = 0.001.

Probabilities are estimated from draws, so each statement below may fail, with probability alpha at most, over the
draws.

Use: where a proof is wanted, in ℓ2, and N forwards an image can be paid; after training with the same noise (RAT).
Breaks: nothing within its radius, but for the α of the draws; it is of g, not of f, costs accuracy as σ grows, and says
little in ℓ∞.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import scipy.special
import torch
from torch import Tensor

from robustscale.evaluation.accuracy import classify
from robustscale.noise import Noise
from robustscale.types import Forward

ABSTAIN = -1
"""In the place of a class: the draws do not settle which it is. Never equal to a label."""


def lower_bound(count: int, n: int, alpha: float) -> float:
    """The p for which Binomial(n, p) reaches `count` with probability alpha (Clopper and Pearson 1934,
    https://doi.org/10.1093/biomet/26.4.404): the true probability is larger, but for a chance of alpha at most."""
    return float(scipy.special.betaincinv(count, n - count + 1, alpha)) if count else 0.0


def certified_radius(sigma: float, p: float) -> float:
    """σ Φ⁻¹(p), in [0, 1] pixels; negative below p = 1/2, where nothing is proven."""
    return sigma * float(scipy.special.ndtri(p))


def largest_radius(sigma: float, n: int, alpha: float) -> float:
    """What n draws can prove at best, all of them agreeing: σ Φ⁻¹(alpha^(1/n))."""
    return certified_radius(sigma, lower_bound(n, n, alpha))


def tie_probability(first: int, second: int) -> float:
    """The p-value of the exact two-sided test that both classes are equally likely, given `first` >= `second`."""
    return min(1.0, 2 * float(scipy.special.bdtrc(first - 1, first + second, 0.5))) if first else 1.0


def settled(counts: Tensor, alpha: float) -> int:
    """PREDICT: the most frequent class, or ABSTAIN where a tie with the next is not refuted at level alpha."""
    (first, second), (top, _) = (part.tolist() for part in counts.topk(2))
    return int(top) if tie_probability(first, second) <= alpha else ABSTAIN


class Certificate(NamedTuple):
    """Of one image: all that was counted. Radius and class follow from it, σ and alpha."""

    top: int
    """The most frequent class of the first n0 draws: the one that is tested."""
    hits: int
    """How many of the n draws, others than those, fell to it."""
    predicted: int
    """PREDICT, from the n draws; ABSTAIN where they do not settle it."""

    def radius(self, sigma: float, n: int, alpha: float) -> float | None:
        """CERTIFY: within this radius g gives `top`. None where it abstains."""
        p = lower_bound(self.hits, n, alpha)
        return certified_radius(sigma, p) if p > 0.5 else None


@dataclass(frozen=True)
class Smoothed:
    """g, the smoothing of a classifier f with normals of standard deviation σ, in [0, 1] pixels and not clipped.

    The noise is a function of (seed, image's id, purpose, number of the draw): neither the batch nor the number of
    workers changes a draw, and a count changes at most where a logit's last bit decides. Box-Muller over uniforms of
    24 bits gives |η| <= 5.8 σ; a normal exceeds that with probability 8e-9 a pixel. On what rounding can do to
    certificates see Voráček and Hein 2023, https://arxiv.org/abs/2207.07209.
    """

    f: Forward
    classes: int
    sigma: float
    seed: int = 0
    batch: int = 1000
    """Draws that go through f together."""
    report: Callable[[int], None] | None = None
    """Is told of every batch of draws that is done."""

    def counts(self, x: Tensor, index: int, purpose: str, n: int) -> Tensor:
        """(classes,) int64 on the CPU: how often f gave each class among n draws around x (C, H, W).

        A draw whose logits are not finite counts for none of them.
        """
        counts = torch.zeros(self.classes + 1, dtype=torch.int64, device=x.device)
        for start in range(0, n, self.batch):
            draws = torch.arange(start, min(start + self.batch, n), device=x.device)
            eta = Noise.of(self.seed, draws, "smoothing", purpose, index).normal(*x.shape)
            predicted = classify(self.f, x + self.sigma * eta)
            counts += torch.bincount(predicted.where(predicted >= 0, self.classes), minlength=self.classes + 1)
            if self.report is not None:
                self.report(len(draws))
        return counts[:-1].cpu()

    def predict(self, x: Tensor, index: int, n: int, alpha: float) -> int:
        """g(x), or ABSTAIN; wrong with probability alpha at most."""
        return settled(self.counts(x, index, "predict", n), alpha)

    def certify(self, x: Tensor, index: int, n0: int, n: int, alpha: float) -> Certificate:
        """The class is chosen by n0 draws and tested by n others: chosen and tested by the same ones, its bound would
        be too high. PREDICT reads the n draws as well; each of the two statements fails with probability alpha."""
        top = int(self.counts(x, index, "select", n0).argmax())
        counts = self.counts(x, index, "estimate", n)
        return Certificate(top, int(counts[top]), settled(counts, alpha))
