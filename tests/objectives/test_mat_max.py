from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from robustscale.attacks.base import Goal, attacking
from robustscale.attacks.pgd import PGD
from robustscale.attacks.worst_of import WorstOf
from robustscale.losses import cross_entropy
from robustscale.objectives.mat_max import MatMax
from robustscale.objectives.pgd_at import PgdAt
from robustscale.testing.contracts import AT, Recording, TinyNet, random_batch
from robustscale.threat import L2, Linf


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value(seed: int) -> None:
    """Of both norms' images each example keeps the one with the larger loss, and the outer loss is at those."""
    batch = random_batch(8, seed, torch.float64)
    # Balls of like strength, so that each wins somewhere.
    parts = (Recording(PGD(Linf(8 / 255))), Recording(PGD(L2(40 / 255))))
    attack = Recording(WorstOf(parts))
    loss = MatMax(attack)(TinyNet(seed).double().train(), batch, AT)
    model = TinyNet(seed).double().eval()
    with torch.no_grad():
        losses = torch.stack([cross_entropy(model(part.found[0]), batch.y) for part in parts])
    winner = losses.argmax(0)
    x_adv = torch.stack([parts[int(w)].found[0][i] for i, w in enumerate(winner)])
    torch.testing.assert_close(attack.found[0], x_adv, rtol=0, atol=0)
    p = TinyNet(seed).double().train()(x_adv).softmax(1)
    expected = -torch.stack([p[i, y].log() for i, y in enumerate(batch.y)]).mean()
    torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=1e-12)


def test_the_larger_loss_is_at_least_each_norms() -> None:
    batch, objective = random_batch(6), MatMax()
    found = objective.perturb(TinyNet().train(), batch, AT)
    with attacking(TinyNet()) as f, torch.no_grad():
        score = Goal().score(f, batch.x, batch.y, noise=None)  # type: ignore[arg-type]
        worst = score(found)
        for threat in (Linf(8 / 255), L2(128 / 255)):
            alone = PgdAt(PGD(threat=threat)).perturb(TinyNet().train(), batch, AT)
            assert float((score(alone) - worst).mean()) < 0.05


@pytest.mark.parametrize("steps", [1, 4])
def test_forwards(steps: int, forwards: Callable[[PgdAt], int]) -> None:
    """K in each norm, one of each to compare, and the loss's."""
    attack = WorstOf((PGD(steps=steps), PGD(threat=L2(), steps=steps)))
    assert forwards(MatMax(attack)) == 2 * steps + 3


def test_defaults() -> None:
    attack = MatMax().attack
    assert isinstance(attack, WorstOf)
    assert [a.threat for a in attack.attacks if isinstance(a, PGD)] == [Linf(8 / 255), L2(128 / 255)]
