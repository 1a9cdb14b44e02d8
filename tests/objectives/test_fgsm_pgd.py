from __future__ import annotations

import pytest
import torch

from robustscale.attacks.base import attacking
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.objectives.fgsm_pgd import FgsmPgd
from robustscale.testing.contracts import AT, TinyNet, counting, random_batch


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value(seed: int) -> None:
    """Of four images the last is FGSM's at a quarter, the others PGD's, in their own order."""
    batch = random_batch(8, seed, torch.float64)
    objective = FgsmPgd(share=0.25)
    x_adv = objective.perturb(TinyNet(seed).double().train(), batch, AT)
    noise = Noise.of(AT.seed, batch.index, "attack", AT.step)
    with attacking(TinyNet(seed).double()) as f:
        expected = PGD()(lambda x: cross_entropy(f(x), batch.y), batch.x, noise=noise)
        expected[3::4] = FGSM()(lambda x: cross_entropy(f(x), batch.y), batch.x, noise=noise)[3::4]
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)

    loss = objective(TinyNet(seed).double().train(), batch, AT)
    p = TinyNet(seed).double().train()(x_adv).softmax(1)
    value = -torch.stack([p[i, y].log() for i, y in enumerate(batch.y)]).mean()
    torch.testing.assert_close(loss.value, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4])
def test_one_forward_of_fgsms_side_k_of_pgds_and_one_of_the_whole(steps: int) -> None:
    model = TinyNet().train()
    with counting(model) as calls:
        FgsmPgd(attack=PGD(steps=steps))(model, random_batch(8), AT)
    assert calls == [4] + [4] * steps + [8]


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_a_share_of_none_or_all_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="share"):
        FgsmPgd(share=share)
