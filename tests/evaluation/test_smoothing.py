"""What is proven of a smoothed classifier, against a linear one, of which everything is known."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from robustscale.evaluation.smoothing import (
    ABSTAIN,
    Certificate,
    Smoothed,
    certified_radius,
    largest_radius,
    lower_bound,
    settled,
    tie_probability,
)
from robustscale.testing.linear import Linear

SHAPE = (1, 2, 2)
SIGMA = 0.5


def halfspace(distance: float) -> tuple[Linear, Tensor]:
    """Two classes, and an image of class 1 this far from their boundary: P[f(x + η) = 1] = Φ(distance / σ)."""
    normal = torch.full((4,), 0.5)
    model = Linear(torch.stack([torch.zeros(4), normal]), torch.zeros(2))
    return model, (distance * normal).view(SHAPE)


@pytest.mark.parametrize("distance", [0.05, 0.3, 0.9])
def test_radius_is_the_distance_to_a_linear_boundary(distance: float) -> None:
    """σ Φ⁻¹(p) at the true p is exact for a half-space; at the bound it is below, and comes near as n grows."""
    model, x = halfspace(distance)
    p = float(stats.norm.cdf(distance / SIGMA))
    assert certified_radius(SIGMA, p) == pytest.approx(distance, abs=1e-12)
    smoothed, n = Smoothed(model, 2, SIGMA, batch=5000), 20_000
    certificate = smoothed.certify(x, 7, 2000, n, 0.001)
    assert certificate.hits / n == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    radius = certificate.radius(SIGMA, n, 0.001)
    assert certificate.top == certificate.predicted == 1
    assert radius is not None and radius < distance
    assert radius == pytest.approx(distance, abs=0.05)
    # The point beyond the boundary is another class: the radius may not reach it.
    assert int(model((x - (distance + 1e-4) * 0.5)[None]).argmax()) == 0


def test_bound_is_that_of_clopper_and_pearson() -> None:
    """By its definition: at the bound, so many hits or more have probability alpha."""
    for hits, n, alpha in ((1, 10, 0.05), (73, 100, 0.001), (99_000, 100_000, 0.001), (100, 100, 0.01)):
        assert stats.binom.sf(hits - 1, n, lower_bound(hits, n, alpha)) == pytest.approx(alpha, rel=1e-6)
    assert lower_bound(0, 10, 0.05) == 0
    assert lower_bound(1000, 1000, 0.001) == pytest.approx(0.001 ** (1 / 1000))
    assert largest_radius(0.25, 100_000, 0.001) == pytest.approx(0.25 * stats.norm.ppf(0.001 ** (1 / 100_000)))


def test_tie_test_is_the_exact_binomial_one() -> None:
    for first, second in ((5, 5), (9, 1), (60, 40), (1, 0), (1000, 900)):
        assert tie_probability(first, second) == pytest.approx(stats.binomtest(first, first + second).pvalue)
    assert tie_probability(0, 0) == 1
    assert settled(torch.tensor([2, 0, 30]), 0.001) == 2
    assert settled(torch.tensor([20, 0, 30]), 0.001) == ABSTAIN


REPETITIONS, ALPHA = 1000, 0.05


def repeated(distance: float, n: int, n0: int = 20) -> list[Certificate]:
    """Certificates of one image from independent draws: another seed each time."""
    model, x = halfspace(distance)
    return [Smoothed(model, 2, SIGMA, seed=seed).certify(x, 0, n0, n, ALPHA) for seed in range(REPETITIONS)]


def test_certificates_and_predictions_fail_at_rate_alpha_at_most() -> None:
    """A certificate fails where its radius passes the boundary, or its class is another; PREDICT where it names one."""
    limit = int(stats.binom.ppf(1 - 1e-4, REPETITIONS, ALPHA))
    abstained = []
    for distance in (0.01, 0.1, 0.4):
        certificates = repeated(distance, 150)
        radii = [(c.top, c.radius(SIGMA, 150, ALPHA)) for c in certificates]
        wrong = sum(r is not None and (top != 1 or r > distance) for top, r in radii)
        assert wrong <= limit, distance
        assert sum(c.predicted == 0 for c in certificates) <= limit
        abstained.append(sum(c.predicted == ABSTAIN for c in certificates))
        if distance == 0.1:
            # Not conservative either: a bound that is too low by much would hardly ever fail.
            assert wrong > 10
    # Near the boundary it abstains nearly always, as it must; far from it never.
    assert abstained[0] > 0.8 * REPETITIONS and abstained[2] == 0


def test_class_is_chosen_by_other_draws_than_test_it() -> None:
    """On the boundary every certificate is wrong, whichever class it names. Were the class chosen by the draws that
    test it, the larger of two equal counts would be tested, and it would fail at the rate 2 alpha."""
    certificates = repeated(0.0, 150, n0=150)
    wrong = sum(c.radius(SIGMA, 150, ALPHA) is not None for c in certificates)
    assert wrong <= stats.binom.ppf(1 - 1e-4, REPETITIONS, ALPHA)
    assert sum(c.predicted != ABSTAIN for c in certificates) <= stats.binom.ppf(1 - 1e-4, REPETITIONS, ALPHA)


def test_certificate_abstains_where_the_bound_is_not_above_a_half() -> None:
    assert Certificate(1, 55, 1).radius(SIGMA, 100, 0.05) is None
    assert Certificate(1, 65, 1).radius(SIGMA, 100, 0.05) == pytest.approx(
        SIGMA * stats.norm.ppf(stats.beta.ppf(0.05, 65, 36))
    )


def test_counts_depend_on_seed_image_and_purpose_but_not_on_the_batch() -> None:
    model, x = halfspace(0.1)
    counts = [Smoothed(model, 2, SIGMA, batch=batch).counts(x, 3, "estimate", 500).tolist() for batch in (1, 77, 500)]
    assert counts[0] == counts[1] == counts[2] and sum(counts[0]) == 500
    # Of so many draws no two counts are equal by chance.
    smoothed, n = Smoothed(model, 2, SIGMA), 20_000
    several = [
        smoothed.counts(x, 3, "estimate", n),
        smoothed.counts(x, 4, "estimate", n),
        smoothed.counts(x, 3, "select", n),
        Smoothed(model, 2, SIGMA, seed=1).counts(x, 3, "estimate", n),
    ]
    assert len({tuple(c.tolist()) for c in several}) == 4


def test_draws_are_neither_clipped_nor_of_another_scale() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1)[:, :2]

    Smoothed(Spy(), 2, SIGMA).counts(torch.full(SHAPE, 0.5), 0, "estimate", 4000)
    x = torch.cat(seen)
    assert bool((x < 0).any()) and bool((x > 1).any())
    assert float(x.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(x.std()) == pytest.approx(SIGMA, rel=0.02)


def test_draws_that_are_not_finite_are_no_hits() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] * torch.nan

    smoothed = Smoothed(Broken(), 2, SIGMA)
    assert smoothed.counts(torch.zeros(SHAPE), 0, "estimate", 50).tolist() == [0, 0]
    certificate = smoothed.certify(torch.zeros(SHAPE), 0, 10, 50, 0.001)
    assert certificate.radius(SIGMA, 50, 0.001) is None and certificate.predicted == ABSTAIN


def test_predict_names_the_class_of_the_larger_half() -> None:
    model, x = halfspace(0.4)
    assert Smoothed(model, 2, SIGMA).predict(x, 0, 1000, 0.001) == 1
    assert Smoothed(model, 2, SIGMA).predict(-x, 0, 1000, 0.001) == 0
