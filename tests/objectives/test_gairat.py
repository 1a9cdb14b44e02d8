from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.config import decode, encode
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.objectives.gairat import Counted, Gairat
from robustscale.objectives.pgd_at import PgdAt
from robustscale.run import Run
from robustscale.testing.contracts import AT, TinyNet, gradients, random_batch
from robustscale.threat import Linf
from robustscale.types import Batch, Loss, Objective, Progress

ATTACK = PGD(Linf(0.1), steps=7)
"""Strong enough to leave kappas of every size."""
WEIGHTED = ((0.0, -1.0),)


def learned(seed: int = 0) -> tuple[TinyNet, Batch]:
    """A network that has learnt its batch a little: some images stand the attack, some fall."""
    model, batch = TinyNet(seed).double(), random_batch(24, seed, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(batch.x), batch.y).mean().backward()
        optimizer.step()
    model.zero_grad()
    # In eval mode its running statistics stay, and with them what an attack finds.
    return model.eval(), batch


def naive_kappa(model: nn.Module, batch: Batch, at: Progress) -> list[int]:
    """Image by image: before each step, whether x' is still classified as y."""
    kappas = []
    step_size = 2.5 * ATTACK.threat.eps / ATTACK.steps
    for i in range(len(batch.y)):
        one = batch.rows(slice(i, i + 1))
        kappa, x_adv = 0, ATTACK.threat.start(one.x, Noise.of(at.seed, one.index, "attack", at.step))
        for _ in range(ATTACK.steps):
            x_adv = x_adv.detach().requires_grad_()
            logits = model(x_adv)
            if int(logits.argmax()) == int(one.y):
                kappa += 1
            (grad,) = torch.autograd.grad(cross_entropy(logits, one.y).sum(), x_adv)
            x_adv = ATTACK.threat.project(x_adv + step_size * grad.sign(), one.x)
        kappas.append(kappa)
    return kappas


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kappa_is_the_naive_loops(seed: int) -> None:
    model, batch = learned(seed)
    found = Gairat(attack=ATTACK).perturb(model, batch, AT)
    with attacking(model) as f:
        expected = naive_kappa(f, batch, AT)  # type: ignore[arg-type]  # the bare module
    assert found.kappa.tolist() == expected and found.steps == 7
    assert len(set(expected)) > 3, "the network does not tell the images apart"


def formula(model: nn.Module, batch: Batch, found: Counted, lam: float) -> Tensor:
    q = model(found.x_adv).softmax(1)
    omega = [(1 + math.tanh(lam + 5 * (1 - 2 * int(k) / found.steps))) / 2 for k in found.kappa]
    weighted = [w * -q[i, y].log() for i, (w, y) in enumerate(zip(omega, batch.y, strict=True))]
    return torch.stack(weighted).sum() / sum(omega)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("lam", [-1.0, 0.0, 2.0])
def test_value(lam: float, seed: int) -> None:
    model, batch = learned(seed)
    objective = Gairat(attack=ATTACK, lam=((0.0, lam),))
    loss = objective(model, batch, AT)
    found = objective.perturb(model, batch, AT)
    torch.testing.assert_close(loss.value, formula(model, batch, found, lam), rtol=1e-10, atol=1e-12)
    assert loss.metrics["kappa"].item() == pytest.approx(found.kappa.double().mean().item())


@pytest.mark.parametrize("step, weighted", [(0, False), (4, False), (5, True), (9, True)])
def test_weights_from_half_of_training_on(step: int, weighted: bool) -> None:
    model, batch = learned()
    at = AT._replace(step=step, total_steps=10)
    loss = Gairat(attack=ATTACK)(model, batch, at)
    expected = Gairat(attack=ATTACK, lam=WEIGHTED)(model, batch, at) if weighted else PgdAt(ATTACK)(model, batch, at)
    torch.testing.assert_close(loss.value, expected.value)
    assert (abs(loss.value - loss.metrics["robust"]) > 1e-3) == weighted


def test_a_lambda_that_rounds_every_weight_to_zero_still_compares_them() -> None:
    """There ω tends to exp(2 (Λ + 5 - 10 κ / K)), of which only the quotients count."""
    model, batch = learned()
    single, single_batch = model.float(), batch._replace(x=batch.x.float())
    objective = Gairat(attack=ATTACK, lam=((0.0, -60.0),))
    found = objective.perturb(single, single_batch, AT)
    omega = (-20 * found.kappa / found.steps).exp()
    losses = cross_entropy(single(found.x_adv), batch.y)
    value = objective.loss(single, single_batch, found, AT).value
    torch.testing.assert_close(value, (omega * losses).sum() / omega.sum(), rtol=1e-5, atol=0)


def test_weights_are_no_part_of_the_gradient() -> None:
    model, batch = learned()
    objective = Gairat(attack=ATTACK, lam=WEIGHTED)
    found = gradients(objective, model, batch)
    model.zero_grad()
    formula(model, batch, objective.perturb(model, batch, AT), -1.0).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 10])
def test_k_plus_1_forwards(steps: int, forwards: Callable[[Gairat], int]) -> None:
    assert forwards(Gairat(attack=PGD(steps=steps))) == steps + 1


def test_the_attack_ascends_the_cross_entropy(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(Gairat(), lambda p, q, y: -q[y].log())


def test_soft_labels_are_descended_to() -> None:
    model, batch = learned()
    soft = 0.9 * torch.eye(10, dtype=torch.float64)[batch.y] + 0.01
    found: Loss = Gairat(attack=ATTACK)(model, batch._replace(target=soft), AT)
    torch.testing.assert_close(found.value, PgdAt(ATTACK)(model, batch._replace(target=soft), AT).value)


def test_defaults_are_the_papers() -> None:
    gairat = Gairat()
    assert gairat.lam == ((0.0, None), (0.5, -1.0))
    assert gairat.attack == PGD(Linf(0.031), steps=10, step_size=0.007)


def test_a_schedule_comes_back_from_json() -> None:
    objective = Gairat(lam=((0.0, None), (0.25, 2.0), (0.75, -1.5)))
    assert decode(Objective, encode(objective)) == objective  # type: ignore[type-abstract]


@pytest.mark.parametrize("attack, field", [(PGD(restarts=2), "attack.restarts"), (FGSM(), "attack")])
def test_what_cannot_be_counted_is_refused_by_the_run(attack: Any, field: str) -> None:
    with pytest.raises(InputError, match=rf"^objective\.{field}:"):
        Run(objective=Gairat(attack=attack))


@pytest.mark.parametrize(
    "lam", [(), ((0.1, None),), ((0.0, None), (0.0, -1.0)), ((0.0, None), (1.0, -1.0)), ((0.0, math.inf),)]
)
def test_a_schedule_without_sense_is_refused(lam: Any) -> None:
    with pytest.raises(InputError, match="lam"):
        Gairat(lam=lam)
