from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustscale.attacks.base import attacking
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.attacks.worst_of import WorstOf
from robustscale.errors import InputError
from robustscale.noise import Noise
from robustscale.objectives.awp import Awp
from robustscale.objectives.eps_warmup import EpsWarmup, scaled
from robustscale.objectives.pgd_at import PgdAt
from robustscale.testing.contracts import AT, TinyNet, random_batch
from robustscale.threat import L2, Linf
from robustscale.types import Batch, Objective


def by_hand(model: TinyNet, batch: Batch, eps: float, step_size: float, noise: Noise) -> Tensor:
    """Two steps of PGD from a uniform start, in an ℓ∞ ball."""
    low, high = (batch.x - eps).clamp_min(0), (batch.x + eps).clamp_max(1)
    x = torch.minimum(torch.maximum(batch.x + eps * (2 * noise.uniform(1, 8, 8) - 1), low), high)
    with attacking(model) as f:
        for _ in range(2):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(f(x), batch.y, reduction="sum"), x)
            x = torch.minimum(torch.maximum(x + step_size * grad.sign(), low), high)
    return x.detach()


@pytest.mark.parametrize("step, factor", [(0, 0.2), (3, 0.8), (4, 1.0), (9, 1.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value(seed: int, step: int, factor: float) -> None:
    """Half of 10 steps: ε grows by a fifth each."""
    batch, at = random_batch(6, seed, torch.float64), AT._replace(step=step, total_steps=10)
    objective = EpsWarmup(PgdAt(PGD(Linf(0.2), steps=2, step_size=0.15)), share=0.5)
    found = objective(TinyNet(seed).double().train(), batch, at)
    model = TinyNet(seed).double().train()
    x = by_hand(model, batch, factor * 0.2, factor * 0.15, Noise.of(at.seed, batch.index, "attack", at.step))
    expected = torch.nn.functional.cross_entropy(model(x), batch.y)
    torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=1e-12)


def test_takes_the_objectives_forwards(forwards: Callable[[Objective], int]) -> None:
    base = PgdAt(PGD(steps=4))
    assert forwards(EpsWarmup(base, share=1.0)) == forwards(base)


def test_every_ball_and_every_step_in_it_is_scaled() -> None:
    attack = WorstOf((PGD(Linf(0.2), step_size=0.1), FGSM(Linf(0.4), alpha=1.25), PGD(L2(1.0))))
    expected = WorstOf((PGD(Linf(0.1), step_size=0.05), FGSM(Linf(0.2), alpha=1.25), PGD(L2(0.5))))
    assert scaled(Awp(PgdAt(attack, beta=0.3), gamma=0.01), 0.5) == Awp(PgdAt(expected, beta=0.3), gamma=0.01)


def test_a_share_below_a_step_warms_nothing_up() -> None:
    objective = EpsWarmup(PgdAt(), share=0.01)
    assert objective.now(AT._replace(step=0, total_steps=10)) is objective.objective


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EpsWarmup(share=0.0), "share: 0.0"),
        (lambda: EpsWarmup(share=1.1), "share: 1.1"),
        (lambda: EpsWarmup(EpsWarmup()), "objective: eps_warmup inside"),
    ],
)
def test_refuses(make: Callable[[], Objective], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        make()
