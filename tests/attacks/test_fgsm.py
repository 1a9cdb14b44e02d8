"""FGSM, from the image and from a random start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustscale.attacks.base import Goal
from robustscale.attacks.fgsm import FGSM
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.testing.contracts import GOALS, TinyNet, counting, random_batch, shortfall
from robustscale.threat import L2, Linf


def attack_noise(n: int, seed: int = 0) -> Noise:
    return Noise.of(seed, torch.arange(n), "attack")


def rising(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_one_step_is_optimal_on_a_linear_model(goal: Goal, n: int) -> None:
    """In l_inf with the box binding, in l_2 with the box out of reach."""
    assert shortfall(FGSM(Linf(0.1)), Linf(0.1), n, goal).abs().max() < 1e-5
    assert shortfall(FGSM(L2(0.05)), L2(0.05), n, goal, inset=0.06).abs().max() < 1e-4


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_a_step_across_the_ball_is_optimal_from_any_start(goal: Goal, n: int) -> None:
    assert shortfall(FGSM(Linf(0.1), random_start=True, alpha=2.0), Linf(0.1), n, goal).abs().max() < 1e-5


def test_goodfellows_formula() -> None:
    model, batch = TinyNet().eval(), random_batch(4)
    x = batch.x.clone().requires_grad_()
    cross_entropy(model(x), batch.y).sum().backward()
    assert x.grad is not None
    expected = (batch.x + 0.05 * x.grad.sign()).clamp(0, 1)
    found = FGSM(Linf(0.05))(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=attack_noise(4))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_random_start_steps_by_five_quarters() -> None:
    """FGSM-RS on a rising score: min(start + 1.25 eps, eps) per pixel, start uniform in +-eps."""
    x = torch.full((1000, 1, 2, 2), 0.5)
    delta = FGSM(Linf(0.1), random_start=True)(rising, x, noise=attack_noise(1000)) - x
    assert delta.min().item() == pytest.approx(0.025, abs=1e-3) and delta.max().item() == pytest.approx(0.1, abs=1e-6)
    # A start above -eps / 4 ends at the side of the ball: 5 of 8.
    assert (delta > 0.1 - 1e-6).float().mean().item() == pytest.approx(0.625, abs=0.03)


@pytest.mark.parametrize("random_start", [False, True])
def test_noise_moves_only_the_random_start(random_start: bool) -> None:
    x = torch.full((4, 1, 2, 2), 0.5)
    attack = FGSM(Linf(0.1), random_start=random_start)
    first, second = (attack(rising, x, noise=attack_noise(4, seed)) for seed in (0, 1))
    assert random_start != torch.equal(first, second)


def test_costs_one_forward_and_reports_one_step() -> None:
    model, batch, seen = TinyNet().eval(), random_batch(2), []
    with counting(model) as calls:
        FGSM()(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=attack_noise(2), on_step=seen.append)
    assert calls == [2] and len(seen) == 1


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_senseless_step_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        FGSM(alpha=alpha)
