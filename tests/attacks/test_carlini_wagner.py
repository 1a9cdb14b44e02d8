"""Carlini and Wagner's attack: closed forms, an independent implementation, saturated pixels, the ball."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor

from robustscale.attacks.base import Goal
from robustscale.attacks.carlini_wagner import CarliniWagner, _Descent
from robustscale.errors import InputError
from robustscale.losses import margin
from robustscale.noise import Noise
from robustscale.testing.contracts import TinyNet, counting, random_batch
from robustscale.testing.linear import Linear
from robustscale.threat import L2, Linf
from robustscale.types import Score

SHAPE = (1, 8, 8)


def linear_case(n: int = 8) -> tuple[Linear, Tensor, Tensor, Score]:
    """Images that are right, and whose way to the boundary does not touch the box."""
    model = Linear.random(2, SHAPE).requires_grad_(False)
    x = 0.3 + 0.4 * random_batch(n).x
    y = model(x).argmax(1)
    return model, x, y, Goal(loss="margin").score(model, x, y, Noise.of(0, torch.arange(n), "attack"))


def tiny_case(n: int = 8) -> tuple[TinyNet, Tensor, Tensor, Score]:
    """A quarter of the pixels are exactly 0 or 1."""
    model = TinyNet().eval().requires_grad_(False)
    model.fc.weight.mul_(20)
    x = random_batch(n).x
    y = model(x).argmax(1)
    return model, x, y, Goal(loss="margin").score(model, x, y, Noise.of(0, torch.arange(n), "attack"))


def distance_to_boundary(model: Linear, x: Tensor, y: Tensor, other: Tensor, gap: float = 0.0) -> Tensor:
    """(gap of the logits) / ‖w_j - w_i‖, to where the other class leads by `gap`."""
    return (gap - model.gap(x, y, other)) / (model.weight[other] - model.weight[y]).double().norm(dim=1)


@pytest.mark.parametrize("kappa", [0.0, 0.2])
def test_distance_on_a_linear_network(kappa: float) -> None:
    """Within 1 % of the closed form, never below it, and the margin is κ at least."""
    model, x, y, score = linear_case()
    x_adv, distance = CarliniWagner(steps=300, search_steps=7, c=0.1, kappa=kappa).find(score, x)
    best = distance_to_boundary(model, x, y, 1 - y, kappa)
    assert ((distance / best) > 1 - 1e-5).all() and ((distance / best) < 1.01).all()
    torch.testing.assert_close((x_adv - x).flatten(1).norm(dim=1), distance)
    assert (margin(model(x_adv), y) > kappa).all()


def test_targeted_reaches_its_class() -> None:
    model, x = Linear.random(5, SHAPE).requires_grad_(False), 0.3 + 0.4 * random_batch(8).x
    y = model(x).argmax(1)
    score = Goal(loss="margin", target=3).score(model, x, y, Noise.of(0, torch.arange(8), "attack"))
    x_adv, distance = CarliniWagner(steps=100, search_steps=4, c=1.0).find(score, x)
    assert (y != 3).any() and distance.isfinite().all()
    assert (model(x_adv).argmax(1) == 3).all()
    # The target's own images need not move, the others not less than to its boundary with their class.
    others = y != 3
    least = distance_to_boundary(model, x[others], y[others], other=torch.full_like(y[others], 3))
    assert (distance[others] > least - 1e-5).all()


def test_an_image_that_is_wrong_already_is_at_distance_zero() -> None:
    model, x, y, _ = linear_case()
    score = Goal(loss="margin").score(model, x, 1 - y, Noise.of(0, torch.arange(len(x)), "attack"))
    assert CarliniWagner(steps=10, search_steps=2).find(score, x)[1].max() < 1e-4


@pytest.mark.parametrize("early_abort", [False, True])
def test_agrees_with_foolbox(early_abort: bool) -> None:
    """The same images fall, at the same distance; to rounding without early abort, which foolbox does by the batch."""
    with warnings.catch_warnings():
        # Its module of other attacks uses a name that SciPy has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        import foolbox
    model, x, y, score = tiny_case(6)
    theirs = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=6, steps=150, stepsize=0.01, initial_const=1e-3, abort_early=early_abort
    )
    _, found, success = theirs(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=None)
    expected = (found - x).flatten(1).norm(dim=1)
    _, distance = CarliniWagner(steps=150, search_steps=6, early_abort=early_abort).find(score, x)
    # Where it finds nothing foolbox returns a black image, which may be another class by chance.
    assert distance.isfinite().all() and success.all()
    slack = 0.03 if early_abort else 1e-4
    assert abs(float(distance.median() / expected.median()) - 1) < slack
    if not early_abort:
        torch.testing.assert_close(distance, expected, rtol=1e-3, atol=1e-5)


def test_answers_to_the_ball() -> None:
    """Within eps the point found, bit for bit; beyond it on the sphere, and all in the box."""
    model, x, y, score = linear_case()
    attack = CarliniWagner(steps=100, search_steps=4, c=1.0)
    found, distance = attack.find(score, x)
    attack = dataclasses.replace(attack, threat=L2(float(distance.median())))
    x_adv = attack(score, x, noise=Noise.of(0, torch.arange(len(x)), "attack"))
    near = distance <= attack.threat.eps
    assert 0 < int(near.sum()) < len(x)
    assert torch.equal(x_adv[near], found[near]) and (margin(model(x_adv[near]), y[near]) > 0).all()
    far = attack.threat.size(x_adv - x)[~near]
    torch.testing.assert_close(far, torch.full_like(far, attack.threat.eps))
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1


def test_where_nothing_succeeds() -> None:
    """A score that is negative everywhere: the distance is infinite, and the answer is still in the ball."""
    x = random_batch(3).x
    attack = CarliniWagner(L2(0.1), steps=20, search_steps=3)

    def score(z: Tensor) -> Tensor:
        return -1 - z.flatten(1).square().sum(1)

    assert attack.find(score, x)[1].isinf().all()
    x_adv = attack(score, x, noise=Noise.of(0, torch.arange(3), "attack"))
    assert attack.threat.size(x_adv - x).max() <= 0.1 + 1e-6


def test_saturated_pixels_move() -> None:
    """An image of nothing but zeros and ones, where tanh is flat."""
    model, _, _, _ = linear_case()
    x = (random_batch(6).x > 0.5).float()
    y = model(x).argmax(1)
    score = Goal(loss="margin").score(model, x, y, Noise.of(0, torch.arange(6), "attack"))
    x_adv, distance = CarliniWagner(steps=800, search_steps=4, c=10.0).find(score, x)
    assert distance.isfinite().all() and x_adv.isfinite().all()
    assert torch.equal(model(x_adv).argmax(1), 1 - y)


def test_the_loss_that_early_abort_watches_is_never_negative() -> None:
    """A share of a negative number is above it: a rise would pass for a fall."""
    _, x, _, _ = linear_case()
    descent = _Descent(x, torch.full((len(x),), 100.0), kappa=0.2, lr=0.01)
    _, _, loss, succeeded = descent.step(lambda z: 1 + z.flatten(1).mean(1), 1)
    assert succeeded.all() and (loss >= 0).all()


def test_early_abort_forwards_only_the_images_that_go_on() -> None:
    model, x, _, score = tiny_case()
    with counting(model) as calls:
        CarliniWagner(steps=200, search_steps=3).find(score, x)
    assert sum(calls) < 0.8 * 600 * len(x)
    assert calls[0] == len(x) > min(calls)
    with counting(model) as calls:
        CarliniWagner(steps=20, search_steps=3, early_abort=False).find(score, x)
    assert calls == [len(x)] * 60


@pytest.mark.parametrize(
    "change, field",
    [
        ({"steps": 0}, "steps"),
        ({"search_steps": 0}, "search_steps"),
        ({"kappa": -1.0}, "kappa"),
        ({"c": 0.0}, "c"),
        ({"lr": 0.0}, "lr"),
        ({"threat": Linf()}, "threat"),
    ],
)
def test_refuses(change: dict[str, float], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        dataclasses.replace(CarliniWagner(), **change)  # type: ignore[arg-type]
