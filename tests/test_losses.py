"""Losses against their definitions in float64, and where naive formulas overflow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustscale.losses import (
    cross_entropy,
    dlr,
    kl,
    margin,
    rival,
    squared_distance,
    symmetric_kl,
    targeted_dlr,
    targeted_margin,
    total_variation,
)
from robustscale.noise import Noise


def logits(seed: int, n: int = 5, classes: int = 4, scale: float = 3.0) -> torch.Tensor:
    return scale * Noise.of(seed, torch.arange(n), "logits").normal(classes)


def classes(seed: int, n: int = 5, classes: int = 4) -> torch.Tensor:
    return Noise.of(seed, torch.arange(n), "classes").below(classes)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_cross_entropy(seed: int) -> None:
    z, y = logits(seed), classes(seed)
    p = z.double().softmax(1)
    expected = torch.stack([-p[i, c].log() for i, c in enumerate(y)])
    torch.testing.assert_close(cross_entropy(z, y).double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_kl(seed: int) -> None:
    z_p, z_q = logits(seed), logits(seed + 1)
    p, q = z_p.double().softmax(1), z_q.double().softmax(1)
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(kl(z_p, z_q).double(), expected, rtol=1e-5, atol=1e-6)
    assert (kl(z_p, z_q) >= -1e-6).all()
    assert torch.equal(kl(z_p, z_p), torch.zeros(5))


def test_kl_is_not_symmetric_and_names_its_sides() -> None:
    """KL(p || q) with p certain: -log q_0."""
    p, q = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl(p, q).item() == pytest.approx(0.6931, abs=1e-4)
    assert kl(q, p).item() == pytest.approx(24.3069, abs=1e-3)


def test_kl_gives_gradients_to_both_sides() -> None:
    p, q = logits(0).requires_grad_(), logits(1).requires_grad_()
    kl(p, q).sum().backward()
    for side in (p, q):
        assert side.grad is not None and (side.grad.abs().sum(1) > 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_other_distances_of_two_predictions(seed: int) -> None:
    z_p, z_q = logits(seed), logits(seed + 1)
    p, q = z_p.double().softmax(1), z_q.double().softmax(1)
    both = (p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)
    torch.testing.assert_close(symmetric_kl(z_p, z_q).double(), both, rtol=1e-5, atol=1e-6)
    # The largest difference over all sets of classes: the set of those that p gives more.
    largest = torch.where(p > q, p - q, 0).sum(1)
    torch.testing.assert_close(total_variation(z_p, z_q).double(), largest, rtol=1e-5, atol=1e-6)
    squares = torch.stack([(a.double() - b.double()).norm() ** 2 for a, b in zip(z_p, z_q, strict=True)])
    torch.testing.assert_close(squared_distance(z_p, z_q).double(), squares, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_rival(seed: int) -> None:
    z, y = logits(seed), classes(seed)
    p = z.double().softmax(1)
    largest = [max(p[i, k] for k in range(4) if k != c) for i, c in enumerate(y)]
    torch.testing.assert_close(rival(z, y).double(), -(1 - torch.stack(largest)).log(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_confident_logits_stay_finite(scale: float) -> None:
    z, y = logits(0, scale=scale), classes(0)
    other = logits(1, scale=scale)
    for value in (
        *(loss(z, y) for loss in (cross_entropy, margin, rival)),
        *(loss(z, other) for loss in (kl, symmetric_kl, total_variation)),
    ):
        assert value.isfinite().all()


def test_margin() -> None:
    z = torch.tensor([[1.0, 4.0, 2.0], [5.0, 0.0, 4.5]])
    assert torch.equal(margin(z, torch.tensor([1, 2])), torch.tensor([-2.0, 0.5]))


def test_margin_is_positive_exactly_where_the_label_is_missed() -> None:
    z, y = logits(3, n=200), classes(3, n=200)
    assert torch.equal(margin(z, y) > 0, z.argmax(1) != y)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_difference_of_logits_ratio(seed: int) -> None:
    """Equations 6 and 7 of Croce and Hein 2020, an image at a time, right and wrong ones."""
    z, y = logits(seed, n=40, classes=6).double(), classes(seed, n=40, classes=6)
    t = (y + 1 + classes(seed + 1, n=40, classes=5)) % 6
    for i, (row, own, target) in enumerate(zip(z.tolist(), y.tolist(), t.tolist(), strict=True)):
        first, _, third, fourth, *_ = sorted(row, reverse=True)
        best = max(v for k, v in enumerate(row) if k != own)
        expected = -(row[own] - best) / (first - third)
        towards = -(row[own] - row[target]) / (first - (third + fourth) / 2)
        assert dlr(z, y)[i].item() == pytest.approx(expected, rel=1e-10)
        assert targeted_dlr(z, y, t)[i].item() == pytest.approx(towards, rel=1e-10)
        rest = max(v for k, v in enumerate(row) if k != target)
        assert targeted_margin(z, t)[i].item() == row[target] - rest
    assert (dlr(z, y) > 0).any() and (dlr(z, y) < 0).any()
    torch.testing.assert_close(dlr(1e-3 * z, y), dlr(z, y), rtol=1e-6, atol=0)
    torch.testing.assert_close(targeted_dlr(1e-3 * z, y, t), targeted_dlr(z, y, t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_half_precision_logits_are_computed_in_float32(loss: object) -> None:
    z, y = logits(0).bfloat16(), classes(0)
    assert loss(z, y).dtype == torch.float32  # type: ignore[operator]
    assert torch.equal(loss(z, y), loss(z.float(), y))  # type: ignore[operator]


@pytest.mark.parametrize("loss", [cross_entropy, margin, lambda z, y: kl(z, z.roll(1, 0))])
def test_float64_logits_are_computed_in_float64(loss: object) -> None:
    """Otherwise no gradient check could be sharper than 1e-7."""
    z, y = logits(0).double(), classes(0)
    assert loss(z, y).dtype == torch.float64  # type: ignore[operator]
