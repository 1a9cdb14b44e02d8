"""Geometry: projections are nearest points, starts lie inside, ascent is steepest; against float64 closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustscale.errors import InputError
from robustscale.noise import Noise
from robustscale.testing.linear import nearest
from robustscale.threat import L2, Linf, Threat

THREATS = [Linf(0.1), L2(0.5)]
each = pytest.mark.parametrize("threat", THREATS, ids=["linf", "l2"])
seeds = st.integers(0, 2**31)


def images(seed: int, n: int = 4, size: int = 24) -> torch.Tensor:
    """A third of the pixels lies on a side of the box."""
    noise = Noise.of(seed, torch.arange(n), "image")
    return (1.5 * noise.uniform(1, 4, size // 4) - 0.25).clamp(0, 1)


def away(x: torch.Tensor, seed: int, norm: float, power: int = 1) -> torch.Tensor:
    """A point at the l_2 distance `norm`, in a direction drawn as N(0, 1) ** power: an odd power above one gives a few
    pixels nearly all of it, which is hard for an iterated projection."""
    delta = Noise.of(seed, torch.arange(len(x)), "away").normal(*x.shape[1:]).double() ** power
    return (x + norm * delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).to(x.dtype)


@settings(max_examples=150, deadline=None)
@given(seeds, st.floats(0.01, 10.0), st.floats(0.01, 4.0), st.sampled_from([1, 3, 5]))
def test_l2_projection_is_the_nearest_point(seed: int, reach: float, eps: float, power: int) -> None:
    x = images(seed)
    x_adv = away(x, seed, reach * eps, power)
    found = L2(eps).project(x_adv, x)
    torch.testing.assert_close(found.double(), nearest(x_adv.double(), x.double(), eps), rtol=0, atol=3e-6)


@pytest.mark.parametrize("power", [1, 5, 9])
@pytest.mark.parametrize("eps", [0.5, 3.0, 20.0])
def test_l2_projection_of_whole_images(eps: float, power: int) -> None:
    """At 3 x 32 x 32, and up to a ball that covers a good part of the box."""
    noise = Noise.of(0, torch.arange(4), "whole")
    x = (1.5 * noise.uniform(3, 32, 32) - 0.25).clamp(0, 1)
    for reach in (1.01, 3.5, 10):
        x_adv = away(x, 1, reach * eps, power)
        found = L2(eps).project(x_adv, x)
        torch.testing.assert_close(found.double(), nearest(x_adv.double(), x.double(), eps), rtol=0, atol=3e-6)


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(1e-4, 30.0), st.floats(0.0, 1.0))
def test_linf_projection_is_the_nearest_point(seed: int, scale: float, eps: float) -> None:
    """Pixel by pixel: the interval [max(0, x - eps), min(1, x + eps)]."""
    x = images(seed)
    x_adv = away(x, seed, scale)
    wide = x.double()
    expected = torch.minimum(torch.maximum(x_adv.double(), (wide - eps).clamp_min(0)), (wide + eps).clamp_max(1))
    torch.testing.assert_close(Linf(eps).project(x_adv, x).double(), expected, rtol=0, atol=1e-7)


@each
@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=st.floats(1e-4, 30.0))
def test_projection_stays_inside_and_is_idempotent(threat: Threat, seed: int, scale: float) -> None:
    x = images(seed)
    once = threat.project(away(x, seed, scale), x)
    assert once.min() >= 0 and once.max() <= 1
    assert threat.size(once.double() - x.double()).max() <= threat.eps + 1e-6
    torch.testing.assert_close(threat.project(once, x), once, rtol=0, atol=1e-6)
    torch.testing.assert_close(threat.project(x, x), x, rtol=0, atol=0)


@each
@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_ascent_is_the_steepest_unit_step(threat: Threat, seed: int) -> None:
    """grad . step is the dual norm, which no other unit step exceeds (Hoelder)."""
    grad = away(torch.zeros(4, 1, 4, 6), seed, 1.0)
    step = threat.ascend(grad)
    torch.testing.assert_close(threat.size(step), torch.ones(4), rtol=1e-5, atol=0)
    gain = (grad * step).flatten(1).sum(1)
    dual = grad.flatten(1).abs().sum(1) if isinstance(threat, Linf) else grad.flatten(1).norm(dim=1)
    torch.testing.assert_close(gain, dual, rtol=1e-5, atol=0)


@each
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-8, 1e8, 1e18])
def test_ascent_does_not_depend_on_the_gradients_size(threat: Threat, scale: float) -> None:
    """A confident network's gradients are tiny, and must not make the attack's steps shorter."""
    grad = away(torch.zeros(4, 1, 4, 6), 0, 1.0)
    torch.testing.assert_close(threat.ascend(scale * grad), threat.ascend(grad), rtol=1e-5, atol=1e-6)


@each
def test_ascent_of_a_zero_gradient_is_no_step(threat: Threat) -> None:
    assert torch.equal(threat.ascend(torch.zeros(2, 1, 2, 2)), torch.zeros(2, 1, 2, 2))


@each
def test_starts_lie_inside_and_fill_the_ball(threat: Threat) -> None:
    x = torch.full((4000, 1, 2, 2), 0.5)
    size = threat.size(threat.start(x, Noise.of(0, torch.arange(len(x)), "start")) - x)
    assert size.max() <= threat.eps + 1e-6
    # In both norms a uniform point of a d-dimensional ball has P(size <= r) = (r / eps)^d; here d = 4.
    share = torch.sort(size / threat.eps).values.double() ** 4
    steps = torch.arange(1, len(x) + 1) / len(x)
    assert (share - steps).abs().max() < 1.63 / math.sqrt(len(x))  # Kolmogorov-Smirnov at 1 %


@each
def test_starts_at_the_sides_of_the_box_stay_inside(threat: Threat) -> None:
    x = images(3, n=64)
    start = threat.start(x, Noise.of(0, torch.arange(64), "start"))
    assert start.min() >= 0 and start.max() <= 1
    assert threat.size(start - x).max() <= threat.eps + 1e-6


@each
def test_an_empty_budget_changes_nothing(threat: Threat) -> None:
    x = images(0)
    none = type(threat)(0.0)
    assert torch.equal(none.project(away(x, 0, 1.0), x), x)
    assert torch.equal(none.start(x, Noise.of(0, torch.arange(4), "start")), x)


@pytest.mark.parametrize("make, eps", [(Linf, 8), (Linf, -0.1), (L2, 128), (L2, -1), (Linf, float("nan"))])
def test_eps_in_the_wrong_unit_is_refused(make: type[Threat], eps: float) -> None:
    with pytest.raises(InputError, match=r"eps: .* in \[0, 1\] pixels"):
        make(eps)
