from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.objectives.adversarial_regularization import AdversarialRegularization
from robustscale.testing.contracts import Recording, TinyNet, gradients, random_batch
from robustscale.threat import Linf
from robustscale.types import Batch


def formula(lam: float) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        p, q = model(batch.x).softmax(1), model(x_adv).softmax(1)
        per_example = [-q[i, y].log() + lam * (q[i] * (q[i] / p[i]).log()).sum() for i, y in enumerate(batch.y)]
        return torch.stack(per_example).mean()

    return value


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("lam", [0.0, 1.0, 5.0])
def test_value(lam: float, seed: int, assert_formula: Callable[..., Any]) -> None:
    loss = assert_formula(AdversarialRegularization(lam=lam), formula(lam), seed)
    parts = loss.metrics["robust"].item() + lam * loss.metrics["regularizer"].item()
    assert loss.value.item() == pytest.approx(parts)


def test_gradients_flow_through_both_sides_of_the_kl() -> None:
    attack = Recording(PGD(Linf(0.03), step_size=0.007))
    batch = random_batch(6, dtype=torch.float64)
    found = gradients(AdversarialRegularization(attack=attack, lam=2.0), TinyNet().double().train(), batch)
    model = TinyNet().double().train()
    formula(2.0)(model, batch, attack.found[0]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 10])
def test_k_plus_3_forwards(steps: int, forwards: Callable[[AdversarialRegularization], int]) -> None:
    assert forwards(AdversarialRegularization(attack=PGD(steps=steps))) == steps + 3


@pytest.mark.parametrize("lam", [0.0, 3.0])
def test_the_attack_ascends_the_objective_that_is_trained(lam: float, assert_ascends: Callable[..., None]) -> None:
    assert_ascends(AdversarialRegularization(lam=lam), lambda p, q, y: -q[y].log() + lam * (q * (q / p).log()).sum())


def test_defaults_are_the_thesis() -> None:
    attack = AdversarialRegularization().attack
    assert attack == PGD(threat=Linf(0.03), steps=10, step_size=0.007, start="uniform")


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(InputError, match="lam"):
        AdversarialRegularization(lam=-0.1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "kl": lambda q, p: (q * (q / p).log()).sum(),
    "symmetric_kl": lambda q, p: (q * (q / p).log()).sum() + (p * (p / q).log()).sum(),
    "total_variation": lambda q, p: sum(abs(a - b) for a, b in zip(q, p, strict=True)) / 2,
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("regularizer", DIVERGENCES)
def test_value_with_another_divergence(regularizer: Any, seed: int, assert_formula: Callable[..., Any]) -> None:
    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        p, q = model(batch.x).softmax(1), model(x_adv).softmax(1)
        divergence = DIVERGENCES[regularizer]
        return torch.stack([-q[i, y].log() + 3.0 * divergence(q[i], p[i]) for i, y in enumerate(batch.y)]).mean()

    assert_formula(AdversarialRegularization(lam=3.0, regularizer=regularizer), value, seed)


@pytest.mark.parametrize("regularizer", DIVERGENCES)
def test_the_attack_ascends_the_divergence_that_is_trained(
    regularizer: Any, assert_ascends: Callable[..., None]
) -> None:
    divergence = DIVERGENCES[regularizer]
    objective = AdversarialRegularization(lam=3.0, regularizer=regularizer)
    assert_ascends(objective, lambda p, q, y: -q[y].log() + 3.0 * divergence(q, p))
