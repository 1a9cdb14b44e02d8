from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.pgd import PGD
from robustscale.attacks.random_of import RandomOf
from robustscale.objectives.mat_rand import MatRand
from robustscale.objectives.pgd_at import PgdAt
from robustscale.testing.contracts import AT, Recording, TinyNet, random_batch
from robustscale.threat import L2, Linf
from robustscale.types import Batch


def formula(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
    p = model(x_adv).softmax(1)
    return torch.stack([-p[i, y].log() for i, y in enumerate(batch.y)]).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value(seed: int) -> None:
    """The images are those of PGD in one of the two norms, the same for the whole batch, and the loss is at them."""
    batch, at = random_batch(6, seed, torch.float64), AT._replace(seed=seed)
    attack = Recording(MatRand().attack)
    loss = MatRand(attack)(TinyNet(seed).double().train(), batch, at)
    expected = formula(TinyNet(seed).double().train(), batch, attack.found[0])
    torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=1e-12)
    sizes = Linf(8 / 255).size(attack.found[0] - batch.x)
    # ℓ2's ball of 128/255 allows a pixel more than 8/255, and PGD uses it.
    assert bool((sizes <= 8 / 255 + 1e-6).all()) or bool((sizes > 9 / 255).all())


def test_both_norms_are_drawn() -> None:
    batch, found = random_batch(4), set()
    for step in range(12):
        attack = Recording(MatRand().attack)
        MatRand(attack)(TinyNet().train(), batch, AT._replace(step=step))
        found.add(bool((Linf().size(attack.found[0] - batch.x) > 9 / 255).all()))
    assert found == {False, True}


@pytest.mark.parametrize("steps", [1, 4])
def test_k_plus_1_forwards(steps: int, forwards: Callable[[PgdAt], int]) -> None:
    attack = RandomOf((PGD(steps=steps), PGD(threat=L2(), steps=steps)))
    assert forwards(MatRand(attack)) == steps + 1


def test_defaults() -> None:
    attack = MatRand().attack
    assert isinstance(attack, RandomOf)
    assert [a.threat for a in attack.attacks if isinstance(a, PGD)] == [Linf(8 / 255), L2(128 / 255)]
