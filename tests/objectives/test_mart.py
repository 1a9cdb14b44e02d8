from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.losses import rival
from robustscale.objectives.mart import Mart
from robustscale.testing.contracts import AT, Recording, TinyNet, gradients, random_batch
from robustscale.types import Batch


def formula(lam: float) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        p, q = model(batch.x).softmax(1), model(x_adv).softmax(1)
        per_example = []
        for i, y in enumerate(batch.y):
            largest = max(q[i, k] for k in range(10) if k != y)
            bce = -q[i, y].log() - (1 - largest).log()
            per_example.append(bce + lam * (p[i] * (p[i] / q[i]).log()).sum() * (1 - p[i, y]))
        return torch.stack(per_example).mean()

    return value


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("lam", [0.0, 5.0])
def test_value(lam: float, seed: int, assert_formula: Callable[..., Any]) -> None:
    loss = assert_formula(Mart(lam=lam), formula(lam), seed)
    parts = loss.metrics["robust"].item() + lam * loss.metrics["consistency"].item()
    assert loss.value.item() == pytest.approx(parts)


def test_gradients_flow_through_both_predictions_and_the_weight() -> None:
    attack = Recording(PGD(start="gaussian"))
    batch = random_batch(6, dtype=torch.float64)
    found = gradients(Mart(attack=attack), TinyNet().double().train(), batch)
    model = TinyNet().double().train()
    formula(5.0)(model, batch, attack.found[0]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 10])
def test_k_plus_2_forwards(steps: int, forwards: Callable[[Mart], int]) -> None:
    assert forwards(Mart(attack=PGD(steps=steps))) == steps + 2


def test_the_attack_ascends_the_cross_entropy(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(Mart(), lambda p, q, y: -q[y].log())


def test_a_network_that_is_sure_of_a_wrong_class_gives_finite_gradients() -> None:
    """Where 1 - max p rounds to 0 in float32 and log(1 - p) is infinite."""
    logits = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    value = rival(logits, torch.tensor([0]))
    value.sum().backward()
    assert value.item() == pytest.approx(200 - torch.tensor(2.0).log().item())
    assert logits.grad is not None and logits.grad.tolist() == [[-0.5, 1.0, -0.5]]


def test_soft_labels_are_descended_to() -> None:
    batch = random_batch(6, dtype=torch.float64)
    soft = 0.9 * torch.eye(10, dtype=torch.float64)[batch.y] + 0.01
    attack = Recording(PGD())
    found = Mart(attack=attack, lam=0.0)(TinyNet().double(), batch._replace(target=soft), AT)
    log_q = TinyNet().double()(attack.found[0]).log_softmax(1)
    largest = log_q.exp().scatter(1, batch.y[:, None], 0).amax(1)
    torch.testing.assert_close(found.value, (-(soft * log_q).sum(1) - (1 - largest).log()).mean())


def test_defaults_are_the_papers() -> None:
    mart = Mart()
    assert mart.lam == 5 and mart.attack == PGD(start="gaussian") and mart.batchnorm == "eval"


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(InputError, match="lam"):
        Mart(lam=-1)
