"""APGD: its checkpoints, its step sizes, what it keeps, and an independent transcription of the algorithm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from robustscale.attacks.apgd import APGD, checkpoints
from robustscale.attacks.base import Goal
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.noise import Noise
from robustscale.testing.contracts import GOALS, TinyNet, counting, random_batch, shortfall
from robustscale.threat import L2, Linf, Threat
from robustscale.types import Score


def attack_noise(n: int) -> Noise:
    return Noise.of(0, torch.arange(n), "attack")


def sharp_net() -> TinyNet:
    """With logits far apart: robustness is lost for some images within the radii below, and kept for others."""
    model = TinyNet().double().eval().requires_grad_(False)
    model.fc.weight.mul_(20)
    return model


def test_checkpoints_of_the_paper() -> None:
    """p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    assert checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert list(checkpoints(50)) == [11, 21, 29, 35, 40, 44, 47, 50]
    assert checkpoints(1) == {1: 1}


def by_hand(attack: APGD, score: Score, x: Tensor, start: Tensor) -> tuple[Tensor, list[float]]:
    """Algorithm 1 for one image (1, C, H, W), in plain Python; the best point, and the step size of each step."""

    def f(z: Tensor) -> tuple[float, Tensor]:
        z = z.detach().requires_grad_()
        value = score(z)
        (grad,) = torch.autograd.grad(value.sum(), z)
        return float(value.detach()), grad

    project, ascend = attack.threat.project, attack.threat.ascend
    points, (value, grad) = [start], f(start)
    values, best, best_value, best_grad = [value], start, value, grad
    eta, etas, x_k, before = 2 * attack.threat.eps, [], start, start
    halved_before, best_before, last = True, value, 0
    for k in range(attack.steps):
        etas.append(eta)
        z = project(x_k + eta * ascend(grad), x)
        alpha = 1.0 if k == 0 else 0.75
        before, x_k = x_k, project(x_k + alpha * (z - x_k) + (1 - alpha) * (x_k - before), x)
        value, grad = f(x_k)
        points.append(x_k)
        values.append(value)
        if value > best_value:
            best, best_value, best_grad = x_k, value, grad
        if k + 1 in checkpoints(attack.steps):
            rising = sum(values[i + 1] > values[i] for i in range(last, k + 1))
            halve = rising <= 0.75 * (k + 1 - last) or (not halved_before and best_before == best_value)
            if halve:
                eta, x_k, grad = eta / 2, best, best_grad
            halved_before, best_before, last = halve, best_value, k + 1
    return best, etas


@pytest.mark.parametrize("goal", [Goal(), Goal(loss="dlr"), Goal(loss="dlr", target="ranked")], ids=str)
@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.3)], ids=["linf", "l2"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_is_the_algorithm(seed: int, threat: Threat, goal: Goal) -> None:
    model, batch = sharp_net(), random_batch(6, seed, torch.float64)
    noise = attack_noise(6)
    attack = APGD(threat, steps=40)
    halvings = []
    for i in range(6):
        one = torch.tensor([i])
        x, y, own = batch.x[one], batch.y[one], noise.rows(one)
        score = goal.score(model, x, y, own)
        expected, etas = by_hand(attack, score, x, threat.start(x, own))
        assert torch.equal(attack(score, x, noise=own), expected)
        halvings.append(len(set(etas)))
    assert max(halvings) > 2, "no step size was ever halved: the test shows little"


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_l2_reaches_the_optimum_with_the_box_binding(goal: Goal) -> None:
    short = shortfall(APGD(L2(1.0)), L2(1.0), 5, goal)
    assert short.min() > -1e-5 and short.max() < 1e-4


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.3)], ids=["linf", "l2"])
def test_scores_above_pgd(threat: Threat) -> None:
    """At equal cost, on a network that is not linear, in the mean; and never below the restart before."""
    model, batch = sharp_net(), random_batch(32, dtype=torch.float64)
    score, noise = Goal().score(model, batch.x, batch.y, attack_noise(32)), attack_noise(32)
    value = {
        name: score(attack(score, batch.x, noise=noise))
        for name, attack in {
            "pgd": PGD(threat, steps=50),
            "once": APGD(threat, steps=50),
            "thrice": APGD(threat, steps=50, restarts=3),
        }.items()
    }
    assert value["once"].mean() > value["pgd"].mean()
    assert (value["thrice"] >= value["once"]).all() and (value["thrice"] > value["once"]).any()


def test_returns_the_best_point_it_saw() -> None:
    model, batch = sharp_net(), random_batch(8, dtype=torch.float64)
    score = Goal().score(model, batch.x, batch.y, attack_noise(8))
    seen: list[Tensor] = []
    x_adv = APGD(Linf(0.05), steps=20)(score, batch.x, noise=attack_noise(8), on_step=seen.append)
    assert len(seen) == 20
    best = torch.stack([score(x) for x in seen]).amax(0)
    assert torch.equal(score(x_adv), best)
    assert not torch.equal(x_adv, seen[-1])


def test_forwards() -> None:
    model, batch = TinyNet().eval(), random_batch(4)
    score = Goal().score(model, batch.x, batch.y, attack_noise(4))
    with counting(model) as calls:
        APGD(Linf(0.05), steps=10, restarts=2)(score, batch.x, noise=attack_noise(4))
    assert calls == [4] * 22


@pytest.mark.parametrize(
    "change, field",
    [({"steps": 0}, "steps"), ({"restarts": 0}, "restarts"), ({"rho": 1.5}, "rho"), ({"momentum": 0.0}, "momentum")],
)
def test_refuses(change: dict[str, float], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        dataclasses.replace(APGD(), **change)  # type: ignore[arg-type]


def test_two_steps_from_the_image_are_apgd_2() -> None:
    """In closed form, for the squared distance to a point: 0.08 away the corner of the ball is nearer, and the second
    step goes back by 0.75 · 0.2 but for 0.25 of momentum; 0.04 away it is not, and half a step from the image is."""
    x = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    nearest = x + torch.tensor([0.08, 0.04]).view(2, 1, 1, 1)
    asked, graded = [], []

    def score(z: Tensor) -> Tensor:
        asked.append(z[:, 0, 0, 0].tolist())
        graded.append(z.requires_grad)
        return -(z - nearest).square().flatten(1).sum(1)

    attack = APGD(Linf(0.1), steps=2, start="none")
    x_adv = attack(score, x, noise=attack_noise(2))
    assert asked == [pytest.approx(point) for point in ([0.5, 0.5], [0.6, 0.6], [0.475, 0.575])]
    assert x_adv[:, 0, 1, 1].tolist() == pytest.approx([0.6, 0.575])
    assert graded == [True, True, False]
    assert torch.equal(attack(score, x, noise=Noise.of(1, torch.arange(2), "attack")), x_adv)
