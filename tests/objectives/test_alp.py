from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import Goal
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.objectives.alp import Alp
from robustscale.testing.contracts import AT, Recording, TinyNet, gradients, random_batch
from robustscale.types import Batch

Classify = Literal["adversarial", "clean", "both"]
SHARES: dict[Classify, tuple[float, float]] = {"adversarial": (0.0, 1.0), "clean": (1.0, 0.0), "both": (0.5, 0.5)}


def formula(classify: Classify, lam: float) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    of_clean, of_adv = SHARES[classify]

    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        z, z_adv = model(batch.x), model(x_adv)
        per_example = []
        for i, y in enumerate(batch.y):
            natural, robust = -z[i].softmax(0)[y].log(), -z_adv[i].softmax(0)[y].log()
            pairing = sum((z[i, k] - z_adv[i, k]) ** 2 for k in range(10))
            per_example.append(of_clean * natural + of_adv * robust + lam * pairing)
        return torch.stack(per_example).mean()

    return value


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("classify", SHARES)
def test_value(classify: Classify, seed: int, assert_formula: Callable[..., Any]) -> None:
    assert_formula(Alp(classify=classify), formula(classify, 0.5), seed)


def test_gradients_flow_through_both_logits() -> None:
    attack = Recording(PGD())
    batch = random_batch(6, dtype=torch.float64)
    found = gradients(Alp(attack=attack), TinyNet().double().train(), batch)
    model = TinyNet().double().train()
    formula("adversarial", 0.5)(model, batch, attack.found[0]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 10])
def test_k_plus_2_forwards(steps: int, forwards: Callable[[Alp], int]) -> None:
    assert forwards(Alp(attack=PGD(steps=steps))) == steps + 2


def test_the_attack_ascends_the_cross_entropy(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(Alp(), lambda p, q, y: -q[y].log())


def test_the_attack_may_descend_to_the_least_likely_class(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(Alp(goal=Goal(target="least_likely")), lambda p, q, y: q[p.argmin()].log())


def test_half_precision_logits_are_paired_in_float() -> None:
    batch = random_batch(6)
    with torch.autocast("cpu", torch.bfloat16):
        assert Alp()(TinyNet(), batch, AT).value.dtype == torch.float32


def test_defaults() -> None:
    alp = Alp()
    assert (alp.lam, alp.classify, alp.batchnorm, alp.attack) == (0.5, "adversarial", "eval", PGD())


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(InputError, match="lam"):
        Alp(lam=-1)
