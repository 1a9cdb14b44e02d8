"""MI-FGSM: the paper's recursion, its step count and what momentum changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.testing.contracts import GOALS, TinyNet, counting, random_batch, shortfall
from robustscale.threat import L2, Linf, Threat


def attack_noise(n: int) -> Noise:
    return Noise.of(0, torch.arange(n), "attack")


def transcription(score: object, x: Tensor, threat: Threat, steps: int, mu: float) -> Tensor:
    """Algorithm 1 of the paper for one image (C, H, W), with the step of section 3.3 in l_2."""
    x_adv, g = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        leaf = x_adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(score(leaf), leaf)  # type: ignore[operator]
        g = mu * g + grad / grad.abs().sum()
        step = g.sign() if isinstance(threat, Linf) else g / g.norm()
        x_adv = x_adv + threat.eps / steps * step
        x_adv = torch.minimum(torch.maximum(x_adv, x - threat.eps), x + threat.eps) if step.abs().max() == 1 else x_adv
        x_adv = x_adv.clamp(0, 1)
    return x_adv


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.4)], ids=["linf", "l2"])
def test_the_papers_recursion(threat: Threat, mu: float, seed: int) -> None:
    """In float64; in l_2 the box is out of reach, as the paper clips alone where this projects."""
    model, batch = TinyNet(seed).double().eval(), random_batch(3, seed, torch.float64)
    x = batch.x if isinstance(threat, Linf) else 0.5 + 0.05 * (batch.x - 0.5)
    found = MIFGSM(threat, steps=4, mu=mu)(lambda x: cross_entropy(model(x), batch.y), x, noise=attack_noise(3))
    for i in range(3):

        def score(image: Tensor, y: Tensor = batch.y[i : i + 1]) -> Tensor:
            return cross_entropy(model(image[None]), y)[0]

        torch.testing.assert_close(found[i], transcription(score, x[i], threat, 4, mu), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_optimal_on_a_linear_model(goal: object, n: int) -> None:
    """Its gradient never turns, so K steps of eps / K end at the ball's edge: in l_inf with the box binding."""
    assert shortfall(MIFGSM(Linf(0.1)), Linf(0.1), n, goal).abs().max() < 1e-5  # type: ignore[arg-type]
    short = shortfall(MIFGSM(L2(0.05)), L2(0.05), n, goal, inset=0.06)  # type: ignore[arg-type]
    assert short.abs().max() < 1e-4


def test_without_momentum_it_is_iterated_fgsm() -> None:
    model, batch = TinyNet().double().eval(), random_batch(4, dtype=torch.float64)
    attacks = MIFGSM(Linf(0.1), steps=5, mu=0.0), PGD(Linf(0.1), steps=5, step_size=0.02, start="none")
    first, second = (a(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=attack_noise(4)) for a in attacks)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_a_gradient_that_has_vanished_does_not_stop_what_was_gathered() -> None:
    """Past 0.55 the score is flat; momentum goes on to the ball's edge, while without it the step stays away."""
    x = torch.full((1, 1, 2, 2), 0.5)

    def score(x: Tensor) -> Tensor:
        return x.clamp(max=0.55).flatten(1).sum(1)

    ends = [float(MIFGSM(Linf(0.2), mu=mu)(score, x, noise=attack_noise(1)).max()) for mu in (1.0, 0.0)]
    assert ends == [pytest.approx(0.7), pytest.approx(0.56)]


def test_tiny_gradients_count_as_much_as_others() -> None:
    x = torch.full((1, 1, 2, 2), 0.5)
    for threat in (Linf(0.1), L2(0.1)):
        found = MIFGSM(threat)(lambda x: 1e-30 * x.flatten(1).sum(1), x, noise=attack_noise(1))
        assert threat.size(found - x).item() == pytest.approx(0.1, rel=1e-4)


def test_cost_and_steps() -> None:
    model, batch, seen = TinyNet().eval(), random_batch(2), []
    with counting(model) as calls:
        MIFGSM(steps=7)(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=attack_noise(2), on_step=seen.append)
    assert calls == [2] * 7 and len(seen) == 7


@pytest.mark.parametrize("field", [{"steps": 0}, {"step_size": 0.0}, {"mu": -0.1}], ids=str)
def test_senseless_fields_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(field))):
        MIFGSM(**field)  # type: ignore[arg-type]
