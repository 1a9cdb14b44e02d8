"""Every attack that the package has is held to the contract, in every norm that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from robustscale.attacks.base import Goal, boundary_attack
from robustscale.config import components, decode, encode
from robustscale.testing import contracts
from robustscale.threat import L2, Linf, Threat
from robustscale.types import Attack

ATTACKS = components(Attack)
FORWARDS = {
    "apgd": 101,
    "carlini_wagner": 3 * 40,
    "di_fgsm": 10,
    "eot": 20 * 10,
    "fgsm": 1,
    "m_di_fgsm": 10,
    "mi_fgsm": 10,
    "mixture": (1 + 10) / 2,
    "pgd": 10,
    "random_of": 10,
    "restarts": 5 * (10 + 1),
    "worst_of": 2 * (10 + 1),
}
"""What each attack costs by default, or as shortened below, in forwards of the network an example."""
SHORTER: dict[str, dict[str, Any]] = {
    "carlini_wagner": {"steps": 40, "search_steps": 3, "early_abort": False, "c": 10.0, "lr": 0.05}
}
"""Changes to defaults that would take seconds a check."""
OTHER_SCORE = {"di_fgsm": 0.5, "m_di_fgsm": 0.25}
"""Attacks that ascend the score of transformed images, whose optimum on a linear model is another one: how far at most
they stay below the score's own, on 8 x 8 images that lose an eighth of their side."""


def attack_of(name: str, threat: Threat | None = None) -> Attack:
    attack: Attack = ATTACKS[name](**SHORTER.get(name, {}))
    return attack if threat is None else contracts.in_threat(attack, threat)


def norms_of(name: str) -> tuple[type[Threat], ...]:
    norms: tuple[type[Threat], ...] = getattr(ATTACKS[name], "norms", (Linf, L2))
    return norms


CASES = [
    pytest.param(name, threat, id=f"{name}-{type(threat).__name__}")
    for name in ATTACKS
    for threat in (Linf(0.05), L2(0.5))
    if isinstance(threat, norms_of(name))
]
CHECKS = [
    contracts.check_ascends,
    contracts.check_deterministic,
    contracts.check_leaves_no_trace,
    contracts.check_margin_score,
]
WHOLE_BATCH = {name for name, cls in ATTACKS.items() if getattr(cls, "whole_batch", False)}
LINEAR = [name for name in ATTACKS if boundary_attack(attack_of(name)) is None]
"""What ends at the boundary is not looking for the optimum."""


def test_attacks_are_found() -> None:
    assert {"pgd", "fgsm", "mi_fgsm", "random_of"} <= set(ATTACKS)
    assert {"mixture"} == WHOLE_BATCH, "an attack must have a reason to depend on the batch"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name, threat", CASES)
def test_contract(name: str, threat: Threat, check: Callable[[Attack], None]) -> None:
    check(attack_of(name, threat))


@pytest.mark.parametrize("name, threat", [case for case in CASES if case.values[0] not in WHOLE_BATCH])
def test_what_an_example_gets_is_its_own(name: str, threat: Threat) -> None:
    contracts.check_batch_independent(attack_of(name, threat))


@pytest.mark.parametrize("name, threat", CASES)
def test_stays_inside(name: str, threat: Threat) -> None:
    contracts.check_inside(attack_of(name, threat), threat)


@pytest.mark.parametrize("name, threat", [case for case in CASES if getattr(ATTACKS[case.values[0]], "keeps_best", 0)])
def test_keeps_the_best(name: str, threat: Threat) -> None:
    contracts.check_keeps_best(attack_of(name, threat))


@pytest.mark.parametrize("name", ATTACKS)
def test_cost_is_as_declared(name: str) -> None:
    assert contracts.forwards_per_example(attack_of(name)) == FORWARDS[name]


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("goal", contracts.GOALS, ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_reaches_the_closed_form_optimum(name: str, goal: Goal, n: int) -> None:
    """l_inf: up to the rounding of x + eps. l_2: an attack of few steps from a random start may still be turning
    towards the gradient, so 5 %; tests/attacks shows that more steps close the gap."""
    short = contracts.shortfall(attack_of(name, Linf(0.05)), Linf(0.05), n, goal)
    assert short.min() > -1e-5 and short.max() < OTHER_SCORE.get(name, 1e-5)
    short = contracts.shortfall(attack_of(name, L2(0.04)), L2(0.04), n, goal, inset=0.05)
    assert short.min() > -1e-5 and short.max() < OTHER_SCORE.get(name, 0.05)


@pytest.mark.parametrize("name, threat", CASES)
def test_configuration_round_trips(name: str, threat: Threat) -> None:
    attack = attack_of(name, threat)
    assert decode(Attack, encode(attack)) == attack  # type: ignore[type-abstract]


@pytest.mark.parametrize("name, threat", CASES)
def test_names_the_ball_that_it_stays_in(name: str, threat: Threat) -> None:
    """A combination of attacks in one threat model has that one."""
    assert attack_of(name, threat).threat == threat  # type: ignore[attr-defined]


def test_gradients_are_off_where_an_attack_is_called_without_them() -> None:
    """An attack differentiates by itself, and its image carries no graph."""
    batch = contracts.random_batch(2)
    model = contracts.TinyNet().eval()
    for name in ATTACKS:
        attack = attack_of(name)
        score = contracts.attack_score(attack, model, batch)
        noise = contracts._attack_noise(batch)
        with torch.no_grad():
            off = attack(score, batch.x, noise=noise)
        assert torch.equal(off, attack(score, batch.x, noise=noise)) and not off.requires_grad
