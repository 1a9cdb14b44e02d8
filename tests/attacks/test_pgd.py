"""PGD: its step counts, its starts, its restarts, and the closed-form optimum with the box binding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustscale.attacks.base import Goal
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.testing.contracts import GOALS, TinyNet, counting, random_batch, shortfall
from robustscale.threat import L2, Linf, Threat


def attack_noise(n: int, seed: int = 0) -> Noise:
    return Noise.of(seed, torch.arange(n), "attack")


def run(attack: PGD, n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The adversarial images and their scores."""
    model, batch = TinyNet().eval(), random_batch(n)
    x_adv = attack(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=attack_noise(n, seed))
    with torch.no_grad():
        return x_adv, cross_entropy(model(x_adv), batch.y)


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_linf_reaches_the_optimum_exactly(start: str, goal: Goal, n: int) -> None:
    """A linear score's best corner, within the rounding of one float32 addition a pixel, with the box binding."""
    attack = PGD(threat=Linf(0.1), start=start)  # type: ignore[arg-type]
    assert shortfall(attack, Linf(0.1), n, goal).abs().max() < 1e-5


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("eps", [0.3, 1.0, 3.0])
def test_l2_converges_to_the_optimum_with_the_box_binding(eps: float, goal: Goal, n: int) -> None:
    """60 steps of eps / 2: within 1e-4 of what ball and box allow. Scaling to the ball and then clipping stops at
    several per cent."""
    attack = PGD(threat=L2(eps), steps=60, step_size=eps / 2)
    short = shortfall(attack, L2(eps), n, goal)
    assert short.min() > -1e-5 and short.max() < 1e-4


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.5)], ids=["linf", "l2"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_on_step_sees_every_step(threat: Threat, restarts: int) -> None:
    batch, seen = random_batch(2), []
    attack = PGD(threat=threat, steps=4, restarts=restarts)
    x_adv = attack(lambda x: x.flatten(1).sum(1), batch.x, noise=attack_noise(2), on_step=seen.append)
    assert len(seen) == 4 * restarts
    ends = torch.stack(seen[3::4])
    assert (ends == x_adv).flatten(2).all(2).any(0).all(), "an example did not end where one of its restarts did"


@pytest.mark.parametrize("restarts, forwards", [(1, 5), (3, 3 * 5 + 3)])
def test_cost_is_as_documented(restarts: int, forwards: int) -> None:
    model, batch = TinyNet().eval(), random_batch(2)
    with counting(model) as calls:
        PGD(steps=5, restarts=restarts)(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=attack_noise(2))
    assert calls == [2] * forwards


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.5)], ids=["linf", "l2"])
def test_restarts_never_end_lower_and_sometimes_higher(threat: Threat) -> None:
    """Two short steps leave room for luck; the first restart is the single run itself."""
    _, once = run(PGD(threat=threat, steps=2, step_size=threat.eps / 4), n=64)
    _, often = run(PGD(threat=threat, steps=2, step_size=threat.eps / 4, restarts=4), n=64)
    assert (often >= once).all() and (often > once).any()


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.5)], ids=["linf", "l2"])
@pytest.mark.parametrize("start, differs", [("uniform", True), ("gaussian", True), ("none", False)])
def test_noise_moves_random_starts_alone(threat: Threat, start: str, differs: bool) -> None:
    attack = PGD(threat=threat, steps=1, step_size=1e-3, start=start)  # type: ignore[arg-type]
    assert differs != torch.equal(run(attack, seed=0)[0], run(attack, seed=1)[0])


def test_default_step_is_the_papers_rule() -> None:
    """2.5 eps / steps: from a start without noise, one of ten steps moves a free pixel by eps / 4."""
    x = torch.full((1, 1, 2, 2), 0.5)
    seen: list[Tensor] = []
    PGD(Linf(0.1), start="none")(lambda x: x.flatten(1).sum(1), x, noise=attack_noise(1), on_step=seen.append)
    torch.testing.assert_close(seen[0] - x, torch.full_like(x, 0.025))
    torch.testing.assert_close(seen[-1] - x, torch.full_like(x, 0.1))


def test_gaussian_start_is_a_thousandth() -> None:
    x = torch.full((500, 1, 2, 2), 0.5)
    seen: list[Tensor] = []
    attack = PGD(Linf(0.1), steps=1, step_size=1e-9, start="gaussian")
    attack(lambda x: x.flatten(1).sum(1), x, noise=attack_noise(500), on_step=seen.append)
    assert (seen[0] - x).std().item() == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("field", [{"steps": 0}, {"restarts": 0}, {"step_size": 0.0}, {"step_size": -0.1}], ids=str)
def test_senseless_fields_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(field))):
        PGD(**field)  # type: ignore[arg-type]
