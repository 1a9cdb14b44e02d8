"""EOT: the mean gradient over draws, its memory, and what it reaches where single draws mislead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import Goal, input_gradient
from robustscale.attacks.eot import EOT
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.attacks.restarts import Restarts
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.noise import Noise, drawing, next_draw
from robustscale.testing.contracts import GOALS, TinyNet, counting, random_batch, shortfall
from robustscale.testing.linear import Linear
from robustscale.threat import L2, Linf


def attack_noise(n: int) -> Noise:
    return Noise.of(0, torch.arange(n), "attack")


class Noisy(nn.Module):
    """A linear network whose weights are the true ones plus fresh noise for each example and call."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.linear, self.sigma = Linear.random(2, (1, 8, 8)).double(), sigma

    def forward(self, x: Tensor) -> Tensor:
        noise = next_draw(x).normal(2, 64).to(x.dtype)
        return self.linear(x) + self.sigma * torch.einsum("ncd,nd->nc", noise, x.flatten(1))  # type: ignore[no-any-return]


def gap_reached(attack: EOT | FGSM) -> float:
    """What the attack gains of the true network's gap, as a share of the most that can be gained in l_2."""
    n, model = 64, Noisy(0.5)
    x = torch.full((n, 1, 8, 8), 0.5, dtype=torch.float64)
    own = torch.zeros(n, dtype=torch.int64)
    with drawing(Noise.of(0, torch.arange(n), "network")):
        x_adv = attack(lambda x: model(x)[:, 1] - model(x)[:, 0], x, noise=attack_noise(n))
    gap = model.linear.gap
    best = gap(model.linear.worst(x, own, 1 - own, L2(0.1)), own, 1 - own)
    clean = gap(x, own, 1 - own)
    return float(((gap(x_adv, own, 1 - own) - clean) / (best - clean)).mean())


def test_more_draws_come_nearer_to_the_expectations_optimum() -> None:
    """The mean of n noisy directions has cosine 1 / sqrt(1 + c / n) with the true one w, c = 64 (2 sigma²) / ‖w‖²: each
    score has two calls of the network in it. Up to the spread of 64 draws' lengths."""
    gains = {n: gap_reached(EOT(FGSM(L2(0.1)), draws=n)) for n in (1, 16)}
    assert gains[1] == pytest.approx(gap_reached(FGSM(L2(0.1))), abs=1e-12)
    weight = Noisy(0.5).linear.weight.detach()
    c = 64 * 2 * 0.5**2 / float((weight[1] - weight[0]).square().sum())
    for n, gain in gains.items():
        assert gain == pytest.approx((1 + c / n) ** -0.5, rel=0.1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_are_means_over_calls(seed: int) -> None:
    """In float64: score k of call k is (k + 1) · Σ x³, so the mean over 3 calls is 2 Σ x³."""
    x = random_batch(4, seed, torch.float64).x
    calls: list[int] = []

    def score(x: Tensor) -> Tensor:
        calls.append(len(calls))
        return len(calls) * x.flatten(1).pow(3).sum(1)

    grad, values = input_gradient(lambda x: EOT(draws=3)._mean(score, x), x)
    torch.testing.assert_close(values, 2 * x.flatten(1).pow(3).sum(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, 6 * x**2, rtol=0, atol=1e-12)
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(EOT(draws=3)._mean(score, x), values)
    assert len(calls) == 3


def test_weighted_rows_get_their_own_gradient() -> None:
    """Not only the sum of all scores is differentiated right."""
    x = random_batch(4, dtype=torch.float64).x.requires_grad_()
    weights = torch.tensor([0.0, 1.0, -2.0, 3.0], dtype=torch.float64)
    mean = EOT(draws=2)._mean(lambda x: x.flatten(1).pow(2).sum(1), x)
    (grad,) = torch.autograd.grad((weights * mean).sum(), x)
    torch.testing.assert_close(grad, weights.view(-1, 1, 1, 1) * 2 * x.detach())


def test_one_draws_graph_at_a_time() -> None:
    """No graph of a draw outlives its call: what the network keeps for backward is freed before the next one."""
    model, batch = TinyNet().eval(), random_batch(2)
    alive: list[int] = []

    class Kept:
        count = 0

    def pack(tensor: Tensor) -> Tensor:
        Kept.count += 1
        return tensor

    def score(x: Tensor) -> Tensor:
        alive.append(Kept.count)
        Kept.count = 0
        return cross_entropy(model(x), batch.y)

    x = batch.x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mean = EOT(draws=4)._mean(score, x)
    assert alive[1] == alive[2] == alive[3] > 0
    node, nodes, seen = [mean.grad_fn], 0, set()
    while node:
        current = node.pop()
        if current is not None and current not in seen:
            seen.add(current)
            nodes += 1
            node += [parent for parent, _ in current.next_functions]
    assert nodes < 10, "the mean's graph holds the network's"


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_optimal_on_a_linear_model(goal: Goal) -> None:
    assert shortfall(EOT(PGD(Linf(0.1)), draws=3), Linf(0.1), 8, goal).abs().max() < 1e-5


def test_cost() -> None:
    model, batch = TinyNet().eval(), random_batch(2)
    with counting(model) as calls:
        EOT(PGD(steps=3), draws=4)(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=attack_noise(2))
    assert calls == [2] * 12


def test_restarts_within_are_compared_by_the_mean() -> None:
    model, batch = TinyNet().eval(), random_batch(2)
    with counting(model) as calls:
        attack = EOT(Restarts(PGD(steps=3), restarts=2), draws=4)
        attack(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=attack_noise(2))
    assert calls == [2] * (2 * (3 + 1) * 4)


def test_no_draws_are_refused() -> None:
    with pytest.raises(InputError, match="draws: 0"):
        EOT(draws=0)
