"""Every objective that the package has is held to the contract."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sklearn.datasets import load_digits

from robustscale.attacks.base import BatchNormMode
from robustscale.config import components
from robustscale.testing import contracts
from robustscale.testing.gloo import run_ranks
from robustscale.types import Batch, Objective

OBJECTIVES = components(Objective)
each = pytest.mark.parametrize("objective", [cls() for cls in OBJECTIVES.values()], ids=OBJECTIVES)


FORWARDS = {
    "adversarial_regularization": 13,
    "alp": 12,
    "awp": 12,
    "cw_pgd": 11,
    "eps_warmup": 11,
    "fgsm_pgd": 0.5 * 1 + 0.5 * 10 + 1,
    "fgsm_regularization": 3,
    "gairat": 11,
    "llr": 13,
    "mart": 12,
    "mat_max": 2 * (10 + 1) + 1,
    "mat_rand": 11,
    "natural": 1,
    "oat": 1 + 7 / 8 * (7 + 1),
    "oats": 3 * (1 + 7 / 8 * (7 + 1)),
    "pgd_at": 11,
    "rat": 11,
    "rst": 13,
    "rst_pgd_at": 12,
    "trades": 13,
    "triplet": 9,
    "weak_to_strong": 2,
}
"""What each objective's loss costs by default, in forwards of the network an example; OAT draws λ > 0 for 7 of 8."""


def test_objectives_are_found() -> None:
    assert {"natural", "fgsm_regularization", "pgd_at", "trades", "adversarial_regularization"} <= set(OBJECTIVES)


@each
def test_configuration_round_trips(objective: Objective) -> None:
    contracts.check_round_trip(objective)


@each
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_reach_every_parameter(objective: Objective, precision: torch.dtype) -> None:
    contracts.check_gradients(objective, precision)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_cost_is_as_declared(name: str) -> None:
    assert contracts.forwards_of_loss(OBJECTIVES[name]()) == FORWARDS[name]


@each
def test_is_a_function_of_model_batch_and_progress(objective: Objective) -> None:
    contracts.check_pure(objective)


@pytest.mark.parametrize(
    "objective", [cls() for cls in OBJECTIVES.values() if "batchnorm" in cls.__dataclass_fields__], ids=str
)
@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
def test_batchnorm_during_the_attack(objective: Objective, mode: BatchNormMode) -> None:
    contracts.check_batchnorm(dataclasses.replace(objective, batchnorm=mode), mode)


@each
def test_loss_falls_on_real_digits(objective: Objective) -> None:
    digits = load_digits()
    x = torch.from_numpy(digits.images[:64] / 16).float()[:, None]
    batch = Batch.of(x, torch.from_numpy(digits.target[:64]).long(), torch.arange(64))
    losses = contracts.learn(objective, contracts.network_for(objective), batch)
    assert losses[-1] < losses[0]


def test_two_workers_gradients_are_the_mean_of_the_halves() -> None:
    """One gloo run for all objectives: a process takes seconds to start."""
    # Awp moves both workers' weights along the mean of their gradients; its own test has two workers as well.
    objectives = {name: cls() for name, cls in OBJECTIVES.items() if name != "awp"}
    batch = contracts.random_batch(8, dtype=torch.float64)
    ranks = run_ranks(contracts.ddp_gradients, 2, objectives, batch)
    for name, objective in objectives.items():
        expected = contracts.mean_gradients(objective, batch, 2)
        for found in ranks:
            assert found[name].keys() == expected.keys()
            for parameter, gradient in expected.items():
                torch.testing.assert_close(found[name][parameter], gradient, rtol=1e-9, atol=1e-12)
