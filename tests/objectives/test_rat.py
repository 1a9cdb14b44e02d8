from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.noise import Noise, drawing
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.rat import Rat
from robustscale.testing.contracts import AT, Recording, TinyNet, random_batch
from robustscale.types import Batch


class Keeping(nn.Module):
    """A network that keeps the images it was given."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner, self.given = TinyNet(seed).double(), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        return self.inner(x)  # type: ignore[no-any-return]


def run(seed: int = 0, sigma: float = 0.25, n: int = 64, steps: int = 3) -> tuple[Batch, Keeping, Tensor, Tensor]:
    """(batch, network, x', the loss) of one pass."""
    batch, model, attack = random_batch(n, seed, torch.float64), Keeping(seed).train(), Recording(PGD(steps=steps))
    loss = Rat(attack, sigma=sigma)(model, batch, AT._replace(seed=seed))
    return batch, model, attack.found[0], loss.value


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value(seed: int) -> None:
    """CE at x' + η, for η = what the network was given less x': drawn from N(0, σ²), and not cut to the box."""
    batch, model, x_adv, value = run(seed)
    p = TinyNet(seed).double().train()(model.given[-1]).softmax(1)
    expected = -torch.stack([p[i, y].log() for i, y in enumerate(batch.y)]).mean()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    eta = model.given[-1] - x_adv
    assert float(eta.std()) == pytest.approx(0.25, rel=0.05) and abs(float(eta.mean())) < 0.01
    assert float((eta / 0.25).pow(4).mean()) == pytest.approx(3, rel=0.2)
    assert float(model.given[-1].min()) < 0 and float(model.given[-1].max()) > 1
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1


def test_every_forward_has_a_noise_of_its_own() -> None:
    """One step from the clean image: FGSM's forward, and the loss's."""
    batch, model = random_batch(64, dtype=torch.float64), Keeping().train()
    attack = Recording(FGSM())
    Rat(attack)(model, batch, AT)
    first, last = model.given[0] - batch.x, model.given[1] - attack.found[0]
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), last.flatten()]))[0, 1])) < 0.1
    _, longer, _, _ = run(steps=3)
    # The start is at most 8/255 away, and steps are small, so these differences are mostly the noises'.
    assert all(float((a - b).std()) > 0.3 for a, b in zip(longer.given, longer.given[1:], strict=False))


def test_the_attack_ascends_through_the_noise() -> None:
    batch, model, attack = random_batch(16), TinyNet().train(), Recording(PGD(steps=10))
    Rat(attack, sigma=0.05)(model, batch, AT)
    with attacking(model) as f, torch.no_grad():
        assert cross_entropy(f(attack.found[0]), batch.y).mean() > cross_entropy(f(batch.x), batch.y).mean()


def test_an_examples_noise_does_not_depend_on_its_batch() -> None:
    batch, model = random_batch(6, dtype=torch.float64), Keeping().train()
    Rat(FGSM())(model, batch, AT)
    part = Keeping().train()
    Rat(FGSM())(part, batch.rows(slice(2, 4)), AT)
    torch.testing.assert_close(part.given[0], model.given[0][2:4], rtol=0, atol=0)


def test_it_draws_the_same_inside_a_training_step() -> None:
    """TrainStep announces streams of its own for the network's layers."""
    batch = random_batch(4)
    with drawing(Noise.of(0, batch.index, "network", 3)):
        inside = Rat()(TinyNet().train(), batch, AT)
    assert torch.equal(inside.value, Rat()(TinyNet().train(), batch, AT).value)


def test_little_noise_is_pgd_at() -> None:
    _, _, _, value = run(sigma=1e-9, n=6)
    batch = random_batch(6, dtype=torch.float64)
    expected = PgdAt(PGD(steps=3))(TinyNet().double().train(), batch, AT)
    torch.testing.assert_close(value, expected.value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_k_plus_1_forwards(steps: int, forwards: Callable[[Rat], int]) -> None:
    assert forwards(Rat(PGD(steps=steps))) == steps + 1


@pytest.mark.parametrize("sigma", [0.0, -0.1])
def test_a_sigma_that_is_not_positive_is_refused(sigma: float) -> None:
    with pytest.raises(InputError, match="sigma"):
        Rat(sigma=sigma)
