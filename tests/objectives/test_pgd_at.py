from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import Goal
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.objectives.pgd_at import PgdAt
from robustscale.testing.contracts import AT, Recording, TinyNet, random_batch
from robustscale.threat import Linf
from robustscale.types import Batch


def formula(beta: float) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        p, q = model(batch.x).softmax(1), model(x_adv).softmax(1)
        return torch.stack([-beta * p[i, y].log() - (1 - beta) * q[i, y].log() for i, y in enumerate(batch.y)]).mean()

    return value


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_value(beta: float, seed: int, assert_formula: Callable[..., Any]) -> None:
    assert_formula(PgdAt(beta=beta), formula(beta), seed)


def test_the_attack_ascends_the_cross_entropy(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(PgdAt(), lambda p, q, y: -q[y].log())
    assert_ascends(PgdAt(goal=Goal("predicted")), lambda p, q, y: -q[p.argmax()].log())


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("beta, more", [(0.0, 1), (0.5, 2)])
def test_k_plus_1_forwards_and_one_for_clean_images(
    steps: int, beta: float, more: int, forwards: Callable[[PgdAt], int]
) -> None:
    assert forwards(PgdAt(attack=PGD(steps=steps), beta=beta)) == steps + more


def test_without_adversarial_share_there_is_no_attack(forwards: Callable[[PgdAt], int]) -> None:
    assert forwards(PgdAt(beta=1.0)) == 1


def test_predicted_labels_cost_one_forward_more(forwards: Callable[[PgdAt], int]) -> None:
    assert forwards(PgdAt(goal=Goal("predicted"))) == 12


def test_natural_batches_are_the_named_share_and_whole() -> None:
    objective = PgdAt(attack=PGD(steps=1), beta=0.25, natural_batches=True)
    model, batch = TinyNet().train(), random_batch(2)
    kinds = [tuple(objective(model, batch, AT._replace(step=step)).metrics) for step in range(400)]
    assert set(kinds) == {("natural",), ("robust",)}
    # 3 standard deviations of a binomial of 400 at 0.25.
    assert abs(kinds.count(("natural",)) - 100) < 26


def test_natural_batches_do_not_depend_on_the_worker() -> None:
    """Every worker and shard of a step takes the same side, or DDP's average would mix the losses."""
    objective = PgdAt(attack=PGD(steps=1), beta=0.5, natural_batches=True)
    for step in range(20):
        at = AT._replace(step=step)
        first, second = (objective(TinyNet().train(), random_batch(2, seed), at).metrics for seed in (0, 1))
        assert first.keys() == second.keys()


def test_each_step_draws_its_own_noise() -> None:
    attack = Recording(PGD(Linf(0.1), steps=1, step_size=1e-6))
    for step in (0, 1, 0):
        PgdAt(attack=attack)(TinyNet().train(), random_batch(2), AT._replace(step=step))
    first, second, again = attack.found
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_an_impossible_share_is_refused(beta: float) -> None:
    with pytest.raises(InputError, match="beta"):
        PgdAt(beta=beta)
