from __future__ import annotations

import pytest
import torch

from robustscale.attacks.base import Goal, attacking
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.losses import cross_entropy, margin
from robustscale.noise import Noise
from robustscale.objectives.cw_pgd import CwPgd
from robustscale.testing.contracts import AT, TinyNet, counting, random_batch


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value(seed: int) -> None:
    """Every second image is PGD's on the margin, the others are PGD's on the cross entropy, in their own order."""
    batch = random_batch(8, seed, torch.float64)
    objective = CwPgd()
    x_adv = objective.perturb(TinyNet(seed).double().train(), batch, AT)
    noise = Noise.of(AT.seed, batch.index, "attack", AT.step)
    with attacking(TinyNet(seed).double()) as f:
        by_margin = PGD()(lambda x: margin(f(x), batch.y), batch.x, noise=noise)
        by_entropy = PGD()(lambda x: cross_entropy(f(x), batch.y), batch.x, noise=noise)
    assert not torch.equal(by_margin, by_entropy)
    # In float64 an image is the same in any batch but where a gradient of 1e-17 changes its sign.
    torch.testing.assert_close(x_adv[1::2], by_margin[1::2], rtol=0, atol=1e-9)
    torch.testing.assert_close(x_adv[::2], by_entropy[::2], rtol=0, atol=1e-9)

    loss = objective(TinyNet(seed).double().train(), batch, AT)
    p = TinyNet(seed).double().train()(x_adv).softmax(1)
    expected = -torch.stack([p[i, y].log() for i, y in enumerate(batch.y)]).mean()
    torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(loss.metrics["robust"], loss.value.detach())


@pytest.mark.parametrize("steps", [1, 4])
def test_k_forwards_of_each_side_and_one_of_the_whole(steps: int) -> None:
    model = TinyNet().train()
    with counting(model) as calls:
        CwPgd(attack=PGD(steps=steps), share=0.25)(model, random_batch(8), AT)
    assert calls == [2] * steps + [6] * steps + [8]


def test_the_goal_is_both_sides() -> None:
    """Targeted, both go towards the target."""
    batch = random_batch(8, dtype=torch.float64)
    model = TinyNet().double().train()
    x_adv = CwPgd(goal=Goal(target=3)).perturb(model, batch, AT)
    with attacking(model) as f, torch.no_grad():
        target = torch.full_like(batch.y, 3)
        assert bool((cross_entropy(f(x_adv), target) < cross_entropy(f(batch.x), target)).all())


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_of_none_or_all_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="share"):
        CwPgd(share=share)
