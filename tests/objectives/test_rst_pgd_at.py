from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.rst_pgd_at import RstPgdAt
from robustscale.testing.contracts import AT, TinyNet, random_batch
from robustscale.threat import Linf
from robustscale.types import Batch


def formula(beta: float, natural: float, robust: float) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    """As the authors compute it: each term divided by the sum of its weights over the batch."""

    def term(logits: Tensor, batch: Batch, u: float) -> Tensor:
        log_p = logits.softmax(1).log()
        weights = [1 - u if labelled else u for labelled in batch.labelled.tolist()]
        losses = [-w * log_p[i, y] for i, (w, y) in enumerate(zip(weights, batch.y, strict=True))]
        return torch.stack(losses).sum() / sum(weights)

    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        assert int(batch.labelled.sum()) * 2 == len(batch.y), "half and half, as the authors' batches"
        return (1 - beta) * term(model(batch.x), batch, natural) + beta * term(model(x_adv), batch, robust)

    return value


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta, natural, robust", [(0.5, 0.9, 0.5), (0.2, 0.0, 1.0), (1.0, 0.5, 0.25), (0.0, 0.7, 0.5)])
def test_value(beta: float, natural: float, robust: float, seed: int, assert_formula: Callable[..., Any]) -> None:
    objective = RstPgdAt(beta=beta, unlabelled_natural=natural, unlabelled_robust=robust)
    loss = assert_formula(objective, formula(beta, natural, robust), seed)
    expected = (1 - beta) * loss.metrics["natural"].item() + beta * loss.metrics["robust"].item()
    assert loss.value.item() == pytest.approx(expected)


def test_equal_weights_are_mixed_adversarial_training() -> None:
    batch, attack = random_batch(6), PGD(Linf(0.1))
    rst = RstPgdAt(attack=attack, beta=0.3, unlabelled_natural=0.5)
    mixed = PgdAt(attack=attack, beta=0.7)
    torch.testing.assert_close(
        rst(TinyNet().train(), batch, AT).value, mixed(TinyNet().train(), batch, AT).value, rtol=1e-6, atol=0
    )


def test_pseudo_labels_alone_when_their_weight_is_1() -> None:
    batch = random_batch(6)
    swapped = batch._replace(y=torch.where(batch.labelled, (batch.y + 1) % 10, batch.y))
    swapped = swapped._replace(target=swapped.y)
    rst = RstPgdAt(attack=PGD(start="none", steps=1), unlabelled_natural=1.0, unlabelled_robust=1.0)
    values = [rst(TinyNet().eval(), one, AT).value for one in (batch, swapped)]
    assert torch.equal(*values)


@pytest.mark.parametrize("steps", [1, 10])
def test_k_plus_2_forwards(steps: int, forwards: Callable[[RstPgdAt], int]) -> None:
    assert forwards(RstPgdAt(attack=PGD(steps=steps))) == steps + 2


def test_the_attack_ascends_the_cross_entropy(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(RstPgdAt(), lambda p, q, y: -q[y].log())


def test_defaults_are_the_authors() -> None:
    expected = RstPgdAt(
        PGD(Linf(0.031), steps=10, step_size=0.007, start="gaussian"),
        beta=0.5,
        unlabelled_natural=0.9,
        unlabelled_robust=0.5,
        batchnorm="eval",
    )
    assert RstPgdAt() == expected


@pytest.mark.parametrize("field", ["beta", "unlabelled_natural", "unlabelled_robust"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_shares_out_of_range_are_refused(field: str, value: float) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(InputError, match=rf"^{field}: {value} is outside \[0, 1\]"):
        RstPgdAt(**changes)
