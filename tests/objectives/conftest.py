"""What the tests of single objectives share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.testing.contracts import AT, Probing, Recording, TinyNet, counting, network_for, random_batch
from robustscale.types import Batch, Loss, Objective

Formula = Callable[[nn.Module, Batch, Tensor], Tensor]
"""(network in training mode, batch, x_adv) -> the loss as the paper writes it."""


def gradients_of(value: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


def decided() -> TinyNet:
    """A network that is sure of itself, so that the two directions of a KL are far apart."""
    model = TinyNet().double().train()
    with torch.no_grad():
        model.fc.weight.mul_(30)
    return model


@pytest.fixture
def assert_ascends() -> Callable[[Any, Callable[[Tensor, Tensor, Tensor], Tensor]], None]:
    """The attack's score is the formula's, per example: formula(p(x), p(x'), y) of the probabilities."""

    def check(objective: Any, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        batch = random_batch(6, dtype=torch.float64)
        attack = Probing(random_batch(6, seed=1, dtype=torch.float64).x)
        dataclasses.replace(objective, attack=attack)(decided(), batch, AT)
        model = decided().eval()
        with torch.no_grad():
            p, q = model(batch.x).softmax(1), model(attack.images).softmax(1)
        expected = torch.stack([formula(p[i], q[i], y) for i, y in enumerate(batch.y)])
        torch.testing.assert_close(attack.scores[0], expected, rtol=1e-9, atol=1e-12)

    return check


@pytest.fixture
def assert_formula() -> Callable[[Any, Formula], Loss]:
    """In float64, on equal networks and the objective's own x_adv: value within 1e-12 and gradients within 1e-9 of the
    formula's; returns the loss."""

    def check(objective: Any, formula: Formula, seed: int = 0) -> Loss:
        batch, attack = random_batch(6, seed, dtype=torch.float64), Recording(objective.attack)
        recorded: Objective = dataclasses.replace(objective, attack=attack)
        model, equal = (TinyNet(seed).double().train() for _ in range(2))
        loss = recorded(model, batch, AT)
        expected = formula(equal, batch, attack.found[0] if attack.found else batch.x)
        torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=1e-12)
        found, wanted = gradients_of(loss.value, model), gradients_of(expected, equal)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        return loss

    return check


@pytest.fixture
def forwards() -> Callable[[Objective], int]:
    """How many forwards of the network one loss takes."""

    def count(objective: Objective) -> int:
        model = network_for(objective).train()
        with counting(model) as calls:
            objective(model, random_batch(4), AT)
        assert set(calls) == {4}, "forwards of other batch sizes can't be counted as one each"
        return len(calls)

    return count
